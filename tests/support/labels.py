"""A tokenised conversation as a string in which trained text stands between ⟦ ⟧."""

from llava_moslora.text.conversation import label_runs


def show_labels(input_ids, labels, tokenizer):
    runs = label_runs(input_ids, labels, tokenizer)
    return "".join(f"⟦{text}⟧" if kind == "trained" else text for kind, text in runs)
