"""Compiled sequence layers: filters of design models as scans, memories and Equinox modules."""

from .bayesian_layer import BayesianLayer as BayesianLayer
from .compile import compile_layer as compile_layer
from .compiled import compile_filter as compile_filter
from .language_model import Block as Block
from .language_model import LanguageModel as LanguageModel
from .memory import Memory as Memory
from .memory import Prediction as Prediction
from .memory import StreamMemory as StreamMemory
from .mixer import MixerState as MixerState
from .mixer import SequenceMixer as SequenceMixer
from .mixer import parameter_count as parameter_count
from .published import published_mixer as published_mixer
from .rules import Additive as Additive
from .rules import Restored as Restored
from .scans import filter_scan as filter_scan
from .scans import initial_belief as initial_belief
from .sharded import sharded_scan as sharded_scan
from .stream import Belief as Belief
from .stream import Reading as Reading
from .stream import Stream as Stream
