"""Integer products that come out exact on every CPU: how many levels an int8 weight and an activation may have.

Without VNNI (before Zen 4 and Intel's 10th generation) onnxruntime multiplies unsigned by signed bytes with
``vpmaddubsw``, which adds two neighbouring products in 16 bits and saturates: up to 2 * 255 * 127 where 32767 fit. The
activations' zero point alone brings every pair of large weights near the end. So no pair may get there: activations
have 108 levels on each side of the zero point 108, and two neighbouring weights of a row add up to 151 at most,

    216 * 151 = 32616 <= 32767,

and weights of opposite signs to less than one alone, 216 * 127. Then all kernels add exactly, and one LoRA comes out
on all of them. It costs no time. Two such steps are 1.44 % off where rows are Gaussian and 4096 wide
(tests/export/test_sums.py); 127 levels each would be 1.23 % off, one activation scale for all rows, which was the form
before, 1.43 %.

Of all pairs of limits this one loses least for Gaussian rows: with ``a`` levels an activation's step is ``peak / a``,
the peak of 4096 values being some 3.8 deviations; a weight's is ``pair / w``, the largest pair being some 5.2; and
``2 a w`` is given. Limits of 100 and 163 or 124 and 132 are as good within 3 % (small preset).

The adapter's products read each weight once from memory, so that a second row of activations costs less than it brings
(docs/adr/0010): 64 levels on each side, and 64 more for what they leave. Its weights need no limit for pairs then.
"""

ACTIVATION_LEVELS = 108
"""On each side of zero; also the zero point."""
WEIGHT_LEVELS = 127
"""On each side of zero."""
PAIR_LEVELS = 151
"""The sum of two neighbouring weights of a row, input channels 2 i and 2 i + 1, on each side of zero."""
LARGEST_PAIR = PAIR_LEVELS - 1
"""Before rounding, which may add half a step to each."""
LEVELS_OF_EACH = 64
"""On each side of zero, also the zero point, of each of the adapter's two rows of activations; the second one counts in
128ths of the first one's step. 128 * (127 + 127) = 32512 <= 32767."""
