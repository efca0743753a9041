"""Memory assumptions as NumPyro generative models, and the catalogue of known recurrences."""

from .design_model import DesignModel as DesignModel
from .errors import ModelError as ModelError
