"""Our sweepers, in the package that Hydra takes plugins from and that it shares with others.

Other programs that use Hydra in the same environment pass over a name with an underscore.
"""

from neo.training import compare, search, sweep


class Sweep(sweep.Sweep):
    """Every combination of what is swept."""


class Search(search.Search):
    """What Optuna proposes."""


class Compare(compare.Compare):
    """Choices, each at a rate of its own."""


SWEEPERS = (Sweep, Search, Compare)
