"""Images: datasets and splits (`datasets`), batches, augmentation (`augment`), corruptions."""
