"""Images and labels: from files and packages to batches of pixels."""
