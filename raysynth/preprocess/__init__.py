"""From a case as it was read to samples: layout, resampling, window and slices."""
