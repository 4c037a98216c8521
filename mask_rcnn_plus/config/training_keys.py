"""The config keys of losses, optimiser, averaged weights, checkpoints and early stopping."""

from detectron2.config import CfgNode


def add_training_keys(cfg: CfgNode) -> None:
    """Adds the keys, with their defaults, in place; each default is what detectron2 does.

    Args:
        cfg: a config made by ``detectron2.config.get_cfg()``.
    """
    # What is not trained: names of modules or parameters, each from the beginning of the name to a
    # dot or its end, with the wildcards of file names, as ["backbone.bottom_up.stem",
    # "proposal_generator"] or ["backbone.bottom_up.res[2-4]"]. Batch norms in it keep their
    # statistics, and it drops nothing. The run says what it froze.
    cfg.MODEL.FREEZE = []

    # How RoIs are classified in training, with this project's ROI heads (C4 and Cascade as well):
    # "cross_entropy", or "focal" (arXiv:1708.02002 over the softmax, no alpha), which counts a RoI
    # by (1 - p) ** FOCAL_GAMMA, p the probability that it gives the right class.
    cfg.MODEL.ROI_BOX_HEAD.LOSS_CLS = "cross_entropy"
    cfg.MODEL.ROI_BOX_HEAD.FOCAL_GAMMA = 2.0
    # A factor for the classification loss of the RoIs of each class, in the order of class ids, and
    # of the background if there is one more (else 1); two or more above 0. [] is 1 for all.
    cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS = []
    # "inverse_frequency" has train_net.py set CLASS_WEIGHTS to N / (K * n): n of the N objects of
    # DATASETS.TRAIN are of the class, of K classes. The config saved with the run has the numbers.
    cfg.MODEL.ROI_BOX_HEAD.CLASS_WEIGHTING = "none"

    # "SGD" is detectron2's (with SOLVER.MOMENTUM and NESTEROV). "ADAMW" needs far fewer iterations
    # from random weights; BASE_LR about 0.001, WEIGHT_DECAY about 0.05.
    cfg.SOLVER.OPTIMIZER = "SGD"

    # One kernel updates all weights; it rounds a little otherwise than detectron2's loop.
    cfg.SOLVER.FUSED = False

    # The type that SOLVER.AMP.ENABLED computes in: "fp16" as detectron2 does (CUDA alone, with a
    # scaled loss), or "bf16", which needs no scale and runs on CPUs as well.
    cfg.SOLVER.AMP.DTYPE = "fp16"

    # Gradient accumulation: a batch of SOLVER.IMS_PER_BATCH is computed in this many parts, one
    # after the other, in the memory of one part. As with several GPUs, each part draws its own
    # anchors and RoIs, and its losses are means over these.
    cfg.SOLVER.ACCUMULATE_STEPS = 1

    # The SOLVER.IMS_PER_BATCH for which BASE_LR and the lengths in iterations are meant. With
    # another one, the learning rate is multiplied by their ratio, and MAX_ITER, STEPS,
    # WARMUP_ITERS, CHECKPOINT_PERIOD, TEST.EVAL_PERIOD and TEST.LOSS_PERIOD are divided by it
    # (arXiv:1706.02677), which the run says. 0 scales nothing. (REFERENCE_WORLD_SIZE is
    # detectron2's: the batch itself grows with the number of processes.)
    cfg.SOLVER.REFERENCE_IMS_PER_BATCH = 0

    # An exponential moving average of weights and batch norm statistics, kept beside them. Each
    # evaluation evaluates both (figures "segm/AP" and "ema/segm/AP", files below OUTPUT_DIR/ema),
    # and the run ends with model_ema_final.pth beside model_final.pth.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    # After step t, counted from 1, the average keeps min(DECAY, (1 + t) / (WARMUP + t)) of itself;
    # WARMUP 1 is DECAY from the first step on.
    cfg.SOLVER.EMA.DECAY = 0.999
    cfg.SOLVER.EMA.WARMUP = 10.0

    # How many of the newest periodic checkpoints (every SOLVER.CHECKPOINT_PERIOD iterations) stay;
    # model_final.pth and model_best.pth do so anyway. 0 keeps all.
    cfg.SOLVER.KEEP_CHECKPOINTS = 0

    # The figure by which OUTPUT_DIR/model_best.pth is chosen, as "segm/AP"; with several test sets
    # "NAME/segm/AP"; "validation/total_loss" (TEST.LOSS_PERIOD); "ema/segm/AP" (SOLVER.EMA), which
    # keeps the averaged weights as model_ema_best.pth. It is looked at every TEST.EVAL_PERIOD
    # iterations (a loss: LOSS_PERIOD) and at the end. "" keeps none.
    cfg.TEST.BEST_METRIC = ""
    # "max": the larger the better, "min": the smaller; "auto": a name with "loss" in it falls.
    cfg.TEST.BEST_MODE = "auto"

    # Every so many iterations, and at the end, the training losses on the test sets, image by image
    # at their test size, unaugmented: "validation/loss_mask", ..., "validation/total_loss" (with
    # several test sets "validation/NAME/..."). Norms and dropout work as in evaluation; which RoIs
    # are sampled depends on the image alone. Nothing of the training changes by it. 0 is never.
    # (detectron2 writes the latest value of each figure every 20 iterations.)
    cfg.TEST.LOSS_PERIOD = 0
    # On how many images of each test set, evenly spaced; 0 takes all.
    cfg.TEST.LOSS_IMAGES = 0

    # Ends the run, with final checkpoint and evaluation, once METRIC (named as in BEST_METRIC; ""
    # is never) has not become better by more than MIN_DELTA for PATIENCE looks in a row, one every
    # TEST.EVAL_PERIOD iterations (a validation loss: LOSS_PERIOD). MODE as BEST_MODE.
    cfg.TEST.EARLY_STOPPING = CfgNode()
    cfg.TEST.EARLY_STOPPING.METRIC = ""
    cfg.TEST.EARLY_STOPPING.MODE = "auto"
    cfg.TEST.EARLY_STOPPING.PATIENCE = 5
    cfg.TEST.EARLY_STOPPING.MIN_DELTA = 0.0
