"""Every field there is, with the paper's values; the other configs are deltas over this one."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "default"  # the run's folder is runs/NAME unless --workdir is given
    config.seed = 0
    # Folder of a run whose weights to start from, all but the identity layers; empty: none. Where it and this run have
    # several trials of the same data set, each starts from the one of its number.
    config.init_from = ""
    config.keep_identity_layers = False  # start from these, too: for a further run on the same people

    config.data = data = ConfigDict()
    data.name = "synthetic_pedestrians"  # several joined by +: trained on together, without a test
    # Of sets joined by +: all: everybody, test people too (the paper's pre-training); train: each set's own training
    # people, so that evaluate.datasets can name the sets.
    data.joined_splits = "all"
    data.data_dir = ""  # where the TFDS data lie; empty: TFDS's default, ~/tensorflow_datasets
    data.trials = "0"  # of the protocol's, where it has several: 3, 0-4, 0-4,7 or all
    data.cuhk03_protocol = "single-shot"  # single-shot: 20 trials; 767/700: the split that has that name
    data.cuhk03_train_identities = 1_367  # of a single-shot trial: 1,367 (Table 2) or 1,260 (the paper's text)
    # So many training identities in place of the test, to choose a recipe by: it leaves the real test alone. 0: none.
    data.held_out_identities = 0
    data.height = 224  # pixels; half of it must divide by model.num_strips
    data.width = 224
    data.mean = (0.485, 0.456, 0.406)  # of pixels / 255, subtracted by channel (ImageNet's)
    data.std = (1.0, 1.0, 1.0)
    data.loader = "auto"  # device: all images on the devices; tf_data: decoded by tf.data; auto: device if they fit

    config.augment = augment = ConfigDict()
    augment.flip = True  # half of the crops, left to right
    augment.crop_padding = 0  # pixels: pad by as many on every side and crop back at random
    augment.color_jitter = 0.0  # brightness, contrast and saturation change by factors of up to 1 - and 1 + this
    augment.white_balance = 0.0  # red, green and blue change by factors of their own, from 1 - to 1 + this
    augment.erasing_probability = 0.0  # of random erasing (Zhong et al. 2020): a rectangle takes the mean colour

    config.model = model = ConfigDict()  # the fields of models.JLML
    model.branches = "both"  # both, global, local
    model.loss = "multi"  # multi: a classifier a branch; uni: one on the concatenation (Table 10)
    model.shared_stem = True  # False: a stem a branch (Table 11)
    model.num_strips = 4
    model.stem_features = 32
    model.global_widths = (32, 64, 128, 256)
    model.local_widths = (16, 32, 64, 128)
    model.depth = 3  # residual units a stage
    model.global_feature_dim = 512
    model.local_feature_dim = 512
    model.feature_norm = False  # BN between the feature fc and the identity fc
    model.feature_relu = False  # ReLU there
    # 0: identity layers are linear; else logits are this times the cosine of feature and identity weights, such as 30.
    model.cosine_scale = 0.0
    model.norm_momentum = 0.9
    model.norm_epsilon = 1e-5

    config.loss = loss = ConfigDict()
    loss.lambda_global = 5e-4  # l2,1 penalty; 0 with the next: without selective feature learning (Table 12)
    loss.lambda_local = 5e-4  # exclusive l1,2 penalty
    loss.label_smoothing = 0.0
    loss.margin = 0.0  # taken from the true identity's cosine (CosFace, Wang et al. 2018); needs model.cosine_scale
    # Of the batch-hard triplet loss (Hermans et al. 2017) on each branch's feature, scaled to length 1; 0: none. Needs
    # train.images_per_identity.
    loss.triplet_weight = 0.0
    loss.triplet_margin = 0.3  # of Euclidean distances, which are from 0 to 2

    config.optim = optim = ConfigDict()  # Table 4, "Train"
    optim.learning_rate = 0.01
    optim.schedule = "step"  # step, cosine
    optim.decay_every = 20_000  # steps
    optim.decay_factor = 0.1
    optim.warmup_steps = 0
    optim.momentum = 0.9
    optim.nesterov = False
    optim.weight_decay = 0.0

    config.train = train = ConfigDict()
    train.steps = 50_000
    train.batch_size = 32  # over all devices of all hosts, whose number changes neither it nor the learning rate
    # 0: an epoch has every image once, in random order. Else batches are of so many images a person, the persons in
    # random order; one's last images in an epoch are filled up with others of theirs. What does not fill a last batch
    # is left out of that epoch.
    train.images_per_identity = 0
    # Gradient accumulation: the number of micro-batches that a batch is computed in, where it does not fit in memory.
    # BN normalises each by its own statistics and updates the running ones with each: a smaller batch's BN.
    train.accumulation_steps = 1
    # Batch normalisation by the statistics of an image's camera in the batch, not the whole batch's: for a test with
    # evaluate.norm_statistics=camera. A batch must have several images of each camera. The running statistics are of
    # all cameras together; extract, search and export have each camera's after jlml_jax.adapt --by_camera.
    train.norm_by_camera = False
    # The network is frozen from its input up to and including this layer of Table 1, in all branches: conv1, conv2,
    # conv3, conv4, conv5, or feature, which leaves the identity layers. BN there normalises by its running statistics
    # and leaves them as they are. It needs init_from, and does not go with norm_by_camera. Empty: nothing is frozen.
    train.frozen_through = ""
    train.dtype = "auto"  # of convolutions: float32, bfloat16; auto: bfloat16 on GPU and TPU. Inference is in float32
    # At most, with all images on the devices; 0: 25, and 1 on a CPU. Taken is a divisor of log_every, checkpoint_every,
    # evaluate.every and train.steps.
    train.steps_per_dispatch = 0

    config.evaluate = evaluate = ConfigDict()
    # Steps between evaluations while training. Rank-1 and mAP on the run's own test, or on the people held out, go to
    # metrics.jsonl and TensorBoard, and so do those of the end. Nothing is selected by them. 0: at the end only.
    evaluate.every = 0
    evaluate.normalize = "none"  # none, joint, per_branch: L2 normalisation of the matching feature
    # What BN normalises test images by: run: its running statistics of training; data: those of the tested data set's
    # training images, without their labels; camera: those of each camera's. Of 1,024 of them at random, at most. Images
    # of classes (imagenet2012) are always tested by the run's.
    evaluate.norm_statistics = "run"
    evaluate.flip_average = False  # features are the mean of the image's and its mirror image's
    evaluate.batch_size = 128  # global
    evaluate.max_rank = 50  # to which the report draws the CMC curve; results.json has ranks 1, 5, 10 and 20
    evaluate.datasets = ""  # data sets to be evaluated on besides data.name, in all their trials: viper,grid
    evaluate.extra_gallery = ""  # a data set all of whose images join every gallery as distractors: folder/distractors
    # Market-1501's, in rows of their own: a person's matching features pooled by mean or max; empty: none.
    evaluate.multi_query = "mean"
    # k-reciprocal re-ranking too, in columns of its own; not where a protocol draws one gallery image a person.
    evaluate.reranking = False
    evaluate.baselines = False  # also chance, a colour histogram, the untrained network
    evaluate.picture = True  # ranked.png: a few queries with their top 10

    config.log_every = 100  # steps
    config.checkpoint_every = 1000  # steps
    config.keep_checkpoints = 2
    config.profile = ""  # START:STOP: the steps, counted from 0, to trace for TensorBoard or Perfetto, STOP left out
    # The programs that XLA compiles and, on a CPU, the train step as traced are kept here for later runs; empty: none.
    config.compilation_cache = "~/.cache/jlml_jax"
    return config
