"""What a run leaves behind: metrics lines, TensorBoard events, plots and a progress bar.

This room knows nothing of algorithms: it receives one plain record per round, and arrays.
"""

from fedprompt.tracking.progress import Progress
from fedprompt.tracking.registry import tracker
from fedprompt.tracking.tracker import Tracker

__all__ = ["Progress", "Tracker", "tracker"]
