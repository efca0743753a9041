"""Derivation of exact Kalman filters from design models, their reductions, oracles and proofs."""

from .certificate import Certificate as Certificate
from .derivation import derive as derive
from .errors import NotLinearGaussian as NotLinearGaussian
from .errors import NotSupported as NotSupported
from .exact_filter import ExactFilter as ExactFilter
from .exact_filter import Filtered as Filtered
from .exact_filter import Prediction as Prediction
from .smoothing import smooth as smooth
from .verify import verify as verify
