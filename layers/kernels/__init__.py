"""The exact filter as Pallas Mosaic GPU kernels, for Hopper GPUs.

`forward` filters, with `covariance` for the warpgroups that hold P; `reverse` finds the gradient,
its recursion in `wide` where keys are 128; `exact` joins them for one head, `blocks` prepares what
both need of decays, `restored` has the cotangent of a restoration, `elimination` solves a block's
triangular systems; `mosaic`, `threads` and `elimination` hold every name of Mosaic's; `dispatch`
decides what runs. Rates per key have `keywise` forward, `keywise_reverse` for the gradient's
recursion, `keywise_ratios` for what ratios of each key make of tokens, `keywise_drift` for what a
chunk's own drift is asked for, and `keywise_head` joins them.
`delta_rule` runs means of the reset filter as another library's kernels.
`segments` cuts a few long sequences into parts that run side by side, with `elements` for what a
part does to any belief, `sweep` for what it asks of it, and `joining` for the parts in turn;
`devices` joins parts that several devices hold. `head` makes rows of heads.

**Range.** Read-outs are within 1e-4, gradients within 1e-3 of the filter in float64 of the same
inputs, relative by norm, as tests/test_kernels.py says case by case: any decay; noise down to 1e-4
of the prior variance where the memory drifts, and to 1e-2 where nothing drifts or decays. There,
with keys of cosine 0.9, products in two pieces of bfloat16 cost more as noise falls: at 1e-3 of
the prior variance 3e-5 of read-outs, 1e-3 of the keys' gradient and 4e-3 of the initial
covariance's; at 1e-4, 2e-4, 3e-2 and 2e-1, where XLA in float32 has 1e-4, 3e-4 and 1e-3. Where
almost every decay is below exp(−50), the decays' own gradient all but vanishes, and what the
kernels say of it is rounding: about 2e-6 of the keys' gradient. A restoration λ may be 0 and has
its derivative there; where it changes within 64 tokens, λ below 2e-9 counts as that, and products
of λ lose up to 1e-4 of themselves after tokens that have kept nothing.
Few long sequences, and those over devices, for which decay and drift are given, but are 0 at every
token, have fewer digits (`kernels.segments`).
"""

from .delta_rule import delta_refusal as delta_refusal
from .delta_rule import delta_rule as delta_rule
from .dispatch import Backend as Backend
from .dispatch import chosen as chosen
from .dispatch import device_refusal as device_refusal
from .dispatch import kept_whole as kept_whole
from .dispatch import kernel_scan as kernel_scan
from .dispatch import refusal as refusal
