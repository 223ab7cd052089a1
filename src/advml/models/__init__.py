"""Networks: any timm backbone behind a normalisation layer, with a classifier and a projection head."""
