"""Device code: Triton kernels and the C++ ones in ``cpu/``, as raw functions without autograd.

Installed as ``fastslots.kernels``. Nothing here is imported by ``import fastslots``, and nothing needs a GPU to import.
"""

if __name__ != "fastslots.kernels":
    raise ImportError(f"this package is fastslots.kernels, not {__name__}: install fastslots, then import that name")
