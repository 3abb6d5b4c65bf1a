"""Datasets in memory, batches as index arrays, augmentation on the device."""
