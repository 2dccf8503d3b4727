"""The networks: light students, affine stems, the recursive cascade, and their registry."""
