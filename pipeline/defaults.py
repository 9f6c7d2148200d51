"""The default of every data setting, shared by the Python interface and the config schema. Imports nothing."""

# Crops: sizes in pixels, scales as fractions of the image's area.
NUM_GLOBAL_CROPS, NUM_LOCAL_CROPS = 2, 6
GLOBAL_CROP_SIZE, LOCAL_CROP_SIZE = 224, 96
GLOBAL_CROP_SCALE, LOCAL_CROP_SCALE = (0.4, 1.0), (0.05, 0.4)

# Augmentation. Where two numbers stand, they belong to the first and the second global crop, as in BYOL and DINO.
COLOR_JITTER = 0.4  # strength s: brightness and contrast s, saturation s / 2, hue s / 4
FLIP_PROB = 0.5
COLOR_JITTER_PROB = 0.8
GRAY_PROB = 0.2
GLOBAL_BLUR_PROB, LOCAL_BLUR_PROB = (1.0, 0.1), 0.5
BLUR_SIGMA = (0.1, 2.0)  # pixels of the crop
SOLARIZE_PROB = (0.0, 0.2)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in 0..1

# Loading.
BATCH_SIZE = 64  # images per rank
PREFETCH = 2  # batches
MAX_BAD_SHARE = 0.01  # of all samples
STORE_RETRY_S = 120.0  # for which a store that fails, or shards that are away, are tried again
