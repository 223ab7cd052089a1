"""The 15 common corruptions of CIFAR-C and ImageNet-C (Hendrycks & Dietterich 2019), computed or read from the published files."""
