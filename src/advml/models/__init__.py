"""Networks: a normalisation layer, any timm backbone, a classifier and a projection head; import, export and adaptation of models."""
