"""Memory assumptions as NumPyro generative models, and the catalogue of known recurrences."""

from .associative_regression import associative_regression as associative_regression
from .catalogue import CATALOGUE as CATALOGUE
from .catalogue import Recurrence as Recurrence
from .catalogue import recurrence as recurrence
from .design_model import DesignModel as DesignModel
from .errors import ModelError as ModelError
from .increment_evidence import continuous_increment_evidence as continuous_increment_evidence
from .increment_evidence import increment_evidence as increment_evidence
from .independent_entries import independent_entries as independent_entries
from .independent_entries import (
    independent_entries_with_crosstalk as independent_entries_with_crosstalk,
)
from .policy import Diagonal as Diagonal
from .policy import Exact as Exact
from .policy import Forget as Forget
from .policy import Isotropic as Isotropic
from .policy import Policy as Policy
from .policy import Reset as Reset
from .whole_model import from_scan as from_scan
