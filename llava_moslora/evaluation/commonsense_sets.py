"""The eight sets of the paper's Table 4 and its rows; without torch, as --help lists them."""

# In the order of Table 4's columns: name → (folder below --data, column).
SETS = {
    "arc_easy": ("ARC-Easy", "ARC-e"),
    "openbookqa": ("openbookqa", "OBQA"),
    "social_i_qa": ("social_i_qa", "SIQA"),
    "arc_challenge": ("ARC-Challenge", "ARC-c"),
    "winogrande": ("winogrande", "WinoG."),
    "piqa": ("piqa", "PIQA"),
    "boolq": ("boolq", "BoolQ"),
    "hellaswag": ("hellaswag", "HellaS."),
}
# Table 4: LLaMA-3-8B-Instruct, one run each; last its Avg., which is not always the rounded mean of the eight (FLoRA).
PAPER = {
    "lora": (87.7, 82.8, 79.3, 75.7, 84.8, 86.7, 72.3, 93.5, 82.8),
    "lokr": (89.2, 81.8, 78.7, 76.7, 82.1, 81.6, 65.1, 92.0, 80.9),
    "loha": (91.2, 85.8, 81.1, 80.5, 83.3, 89.7, 75.0, 95.0, 85.2),
    "flora": (90.2, 84.2, 79.9, 79.3, 85.1, 86.7, 74.8, 93.9, 84.2),
    "adalora": (90.4, 85.0, 76.7, 79.1, 83.3, 86.4, 75.1, 75.4, 81.4),
    "dora": (90.1, 87.2, 80.3, 79.1, 84.7, 88.8, 74.5, 95.5, 85.0),
    "dora_r32": (90.5, 85.8, 79.9, 80.4, 85.6, 89.3, 74.6, 95.5, 85.2),
    "moslora": (90.5, 86.8, 81.0, 81.5, 85.8, 89.7, 74.6, 95.0, 85.6),
}
