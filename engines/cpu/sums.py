"""Integer products that come out exact on every CPU: how many levels an int8 weight and an activation may have.

Without VNNI (before Zen 4 and Intel's 10th generation) onnxruntime multiplies unsigned by signed bytes with
``vpmaddubsw``, which adds two neighbouring products in 16 bits and saturates: up to 2 * 255 * 127 where 32767 fit. The
activations' zero point alone brings every pair of large weights near the end. So no pair may get there: activations
have 108 levels on each side of the zero point 108, and two neighbouring weights of a row at most 151 together,

    216 * 151 = 32616 <= 32767.

Then all kernels add exactly, and since everything else is elementwise, one LoRA comes out on all of them. It costs no
time. Two such steps are 1.46 % off where rows are Gaussian and 4096 wide (tests/test_sums.py); 127 levels each would
be 1.23 % off, one activation scale for all rows, which was the form before, 1.43 %.

Of all pairs of limits this one loses least for Gaussian rows: with ``a`` levels an activation's step is ``peak / a``,
the peak of 4096 values being some 3.8 deviations; a weight's is ``pair / w``, the largest pair being some 5.3; and
``2 a w`` is given.
"""

ACTIVATION_LEVELS = 108
"""On each side of zero; also the zero point."""
WEIGHT_LEVELS = 127
"""On each side of zero."""
PAIR_LEVELS = 151
"""Two neighbouring weights of a row, input channels 2 i and 2 i + 1, together."""
LARGEST_PAIR = PAIR_LEVELS - 1
"""Before rounding, which may add half a step to each."""
