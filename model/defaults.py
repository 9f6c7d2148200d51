"""Default values shared by the Python interface of the model and the config schema; importing this module imports nothing."""

# Block masking: four rectangles with 15-20 % of a crop's area each, as the targets of I-JEPA (arXiv 2301.08243, section 3).
NUM_MASKS = 4
MASK_SCALE = (0.15, 0.2)
ASPECT_RATIO = (0.75, 1.5)
# Context and queries are disjoint sets of tokens, so the two ratios add up to 1 at most.
CONTEXT_RATIO = 0.4
QUERY_RATIO = 0.4

PREDICTION_WEIGHT = 1.0
SUMMARY_WEIGHT = 0.0
VIEW_WEIGHT = 1.0
SIGREG_WEIGHT = 0.05
ANCHOR_WEIGHT = 0.0
COLOUR_WEIGHT = 0.0
COLOURS = 64  # of the colour term: 4 levels per channel

GRAD_CHECKPOINTING = False
