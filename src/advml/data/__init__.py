"""Images: where they come from (`datasets`), and how they are varied during training (`augment`)."""
