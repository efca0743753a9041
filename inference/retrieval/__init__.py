r"""What memories recall when keys collide, when they are crowded, and when they forget.

Everywhere keys and queries have length 1, the prior variance of every entry is 1, ρ is the noise
variance (over the prior variance, if that is another), every write first multiplies the memory by
the decay a and adds the drift q to its variance, and a is 1 and q is 0 where a function does not
take them. A read-out is linear in the values written, $y = \sum_i w_i v_i$; these are its weights
w, which do not depend on the values. The *retention* of a value is the weight of its writes, and
the *intrusion* of others is theirs: their sum for one other key, the sum of their squares for many.

| module | what happens | exact filter | others |
|---|---|---|---|
| `one_key` | one key is written n times | algebra | algebra |
| `two_keys`, `alternation` | another key of cosine c, after, before, in turn | algebra | algebra |
| `crowd` | N others with random keys | 1/K², error O(1/K³) | mean, exact |
| `stream` | the same with decay, drift, unequal noise | 1/K, error O(1/K²) | in `crowd` |
| `error` | squared error of what is read | in `crowd`, `stream` | mean, exact |
| `lifetime` | half-lives, capacities | algebra, wide keys | mean, exact |

"algebra" holds for every draw of keys, to rounding; "mean, exact" is of the mean over random keys;
"1/K" is that mean with its first correction for keys of K entries, "1/K²" with its second. The
mean over the direction of the target's key, where an expansion fails if the others are few, is
taken to all orders (`direction`).
"""

from .alternation import Alternated as Alternated
from .alternation import alternated_exact as alternated_exact
from .alternation import alternated_reset as alternated_reset
from .alternation import alternated_superposed as alternated_superposed
from .alternation import alternation_rates as alternation_rates
from .crowd import Crowded as Crowded
from .crowd import corrected_crowd as corrected_crowd
from .crowd import exact_crowd as exact_crowd
from .crowd import exact_overload as exact_overload
from .crowd import limiting_crowd as limiting_crowd
from .crowd import reset_entry_crowd as reset_entry_crowd
from .crowd import superposed_crowd as superposed_crowd
from .error import corrected_error as corrected_error
from .error import misjudged_error as misjudged_error
from .error import read_error as read_error
from .error import reset_overload as reset_overload
from .error import reset_stored_error as reset_stored_error
from .error import superposed_error as superposed_error
from .error import superposed_overload as superposed_overload
from .error import untold_error as untold_error
from .lifetime import capacity as capacity
from .lifetime import crowded_half_life as crowded_half_life
from .lifetime import half_life as half_life
from .lifetime import overwritten_half_life as overwritten_half_life
from .lifetime import reset_crowded_half_life as reset_crowded_half_life
from .one_key import Gains as Gains
from .one_key import Key as Key
from .one_key import counted_gains as counted_gains
from .one_key import entry_weights as entry_weights
from .one_key import fading_gains as fading_gains
from .one_key import forgetting_gains as forgetting_gains
from .one_key import gain_weights as gain_weights
from .one_key import plateau_gain as plateau_gain
from .one_key import plateau_variance as plateau_variance
from .one_key import precision_weights as precision_weights
from .one_key import relaxed_variance as relaxed_variance
from .one_key import reset_entry_weights as reset_entry_weights
from .one_key import reset_gains as reset_gains
from .one_key import settling_rate as settling_rate
from .one_key import spaced as spaced
from .one_key import writes_to_overwrite as writes_to_overwrite
from .stream import exact_stream as exact_stream
from .stream import exact_weights as exact_weights
from .stream import fading_crowd as fading_crowd
from .stream import forgetting_crowd as forgetting_crowd
from .stream import prior_covariance as prior_covariance
from .two_keys import TwoKeys as TwoKeys
from .two_keys import Weights as Weights
from .two_keys import corrected_two_keys as corrected_two_keys
from .two_keys import entry_two_keys as entry_two_keys
from .two_keys import exact_two_keys as exact_two_keys
from .two_keys import reset_entry_two_keys as reset_entry_two_keys
from .two_keys import superposed_two_keys as superposed_two_keys
