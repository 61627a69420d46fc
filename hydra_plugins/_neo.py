"""Our sweepers, in the package that Hydra takes plugins from and that it shares with others.

Other programs that use Hydra in the same environment pass over a name with an underscore.
"""

from neo.training import sweep


class Sweep(sweep.Sweep):
    """Every combination of what is swept."""


SWEEPERS = (Sweep,)
