"""How alike are representations: rows of layers, CKA between them, scalars with intervals, linear probes."""
