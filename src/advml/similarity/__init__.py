"""Similarity of representations: layers, CKA and other measures between them, scalars with intervals, linear probes."""
