"""What ``selftest`` and ``bench`` know of each operator: one file an operator, named as it is.

A file holds NAME (the operator's), ``checks()`` for selftest, and for bench ``shapes(device_type, quick)``,
``contenders(shape, dtype, device)``, ``traffic(shape)`` (the elements that each direction must at least read and write)
and GOALS. Everything else, dtypes and kernels among it, the dispatcher and the backends say.
"""

from omniops.cli.cases import carafe

CASES = (carafe,)
