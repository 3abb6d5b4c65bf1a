"""In which regime a network is: tangent kernels, NNGP kernels and Jacobians, and the theory of wide networks.

Knows nothing of models or training, but for its command line, `__main__`.
"""
