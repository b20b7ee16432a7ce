"""Second-order pruning of pre-trained vision encoders, and what survives it on unseen tasks.

The public names are loaded when first used, so that importing the package stays cheap.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
