"""Instance optimisation of one pair's displacement by closed-form gradients, without autograd and without networks.

`optimiser` holds the method; what costs time is behind one small interface with two backends, `torch_ops` and
`numba_loops`, chosen as `LDRCore.sampling` chooses. Nothing here knows millimetres or models.
"""
