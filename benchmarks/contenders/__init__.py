"""Who is measured at what: one file a task, each a table of contenders.

Other packages are imported when a contender is prepared, so that this folder can be read without
the ``bench`` extra.
"""
