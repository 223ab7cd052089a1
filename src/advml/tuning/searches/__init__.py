"""What `advml tune` can search, described for all processes; the work itself is in `tuning.attack` and `tuning.training`.

Nothing here imports torch: the command's own process must start at once, and a space must be refused at once.
"""

from advml.tuning.searches.attack import AttackSearch
from advml.tuning.searches.training import TrainingSearch

__all__ = ["AttackSearch", "TrainingSearch"]
