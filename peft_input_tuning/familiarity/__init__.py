"""How familiar inputs are to a frozen language model: the measure, its reading in words, and its page.

Nothing of the method is needed for it; of an adapted model it asks the base alone.
"""

from .bigrams import BigramCounts
from .measure import Familiarity, familiarity

__all__ = ["BigramCounts", "Familiarity", "familiarity"]
