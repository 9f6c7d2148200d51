"""Values that the Python interface and the config share; importing this imports nothing else."""

NUM_GLOBAL_CROPS, NUM_LOCAL_CROPS = 2, 6
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels in 0..1
