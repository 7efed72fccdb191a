"""What the code knows about the recipe of `tiny-qwen`; it goes into `training.json`."""

from __future__ import annotations

from .decoder import END_WEIGHT, FOCUS_HEADS, FOCUS_WEIGHT, POSITION_WEIGHT, QUESTIONS_PER_IMAGE
from .facts import Recipe
from .qwen_cache import SIZES
from .qwen_decoder import FOCUS
from .qwen_tower import BACKGROUND, CROPS_UNTIL, EASY_SHARE

DATA = {
    "scenes": "generated, train photos and train digits only",
    "teacher": "tiny-llava, which was trained on the same splits; its card tells of two more training photos",
    "easy_vqa": (
        f"train split only, enlarged to 160 x 160 ({100 * EASY_SHARE:.0f} % of the steps of stage qwen_tower, "
        f"{100 * sum(s.share * s.easy for s in SIZES):.0f} % of the pictures of stage qwen_decoder)"
    ),
    "held_out": "test photos, test digits, easy-VQA test split; never trained on",
    "images_of_stage_qwen_tower": (
        f"counted as crops of 128 x 128 pixels: 24 per step, cut from crowded scenes, for {100 * CROPS_UNTIL:.0f} % of "
        "the time; then whole pictures, crops and mosaics of 128 to 320 pixels, square or not, as many pixels a step"
    ),
    "sizes_of_stage_qwen_decoder": {f"{s.size[0]} x {s.size[1]}": s.share for s in SIZES},
    "questions_per_image": QUESTIONS_PER_IMAGE,
}
AIDS = {
    "distillation": (
        "stage qwen_tower: the merged visual tokens learn tiny-llava's projected features, less the part that is "
        f"linear in the place of the object; background tokens weigh {BACKGROUND}"
    ),
    "dense_patch_labels": (
        "stage qwen_tower: kind and colour of every visual token, read by linear probes that were fitted on "
        "tiny-llava's features and then fixed"
    ),
    "decoder_start": (
        "decoder layers 1 to 6 and the word embeddings start from tiny-llava, whose two heads of decoder layer 2 were "
        "trained with attention supervision; all training aids of tiny-llava act through it"
    ),
    "position_layer": (
        "decoder layer 0 is fitted to turn rotary positions into the left-right and top-bottom parts of tiny-llava's "
        "features, from starting weights set by hand"
    ),
    "attention_supervision": {"decoder_layer": FOCUS, "heads": list(FOCUS_HEADS)},
    "attention_supervision_loss": (
        f"stage qwen_decoder: {FOCUS_WEIGHT} * mean -log(attention mass from the answer position to the tokens of the "
        "object)"
    ),
    "position_axes": (
        f"stage qwen_decoder: {POSITION_WEIGHT} * error of the object centre read from visual tokens after layer 0 "
        "along the word axes left-right and top-bottom"
    ),
    "random_token_subsets": "stage qwen_decoder: 8 to 149 random visual tokens in a quarter of the later steps",
    "end_token_weight": END_WEIGHT,
}
QWEN = Recipe("tiny-qwen", ("qwen_tower", "qwen_decoder"), DATA, AIDS, processes=1)
