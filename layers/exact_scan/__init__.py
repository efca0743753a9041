from .api import scan_exact as scan_exact
from .tokens import Prediction as Prediction
from .tokens import Restoration as Restoration
from .tokens import State as State
from .tokens import Tokens as Tokens
