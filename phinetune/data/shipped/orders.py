"""The demo's chat data: a café customer's sentence into an exact JSON order.

`python -m phinetune.data.shipped.orders` writes `orders.train.jsonl` and `orders.eval.jsonl` beside this
file, the same bytes every time.  The held-out rows use sentence patterns and items that no training row
has, so a model that memorises scores nothing.  The system message states the format with one example:
the base model is judged on the task, not on guessing the format.
"""

import json
import random
from pathlib import Path
from typing import Any

SEED = 20240423
TRAIN_ROWS, EVAL_ROWS = 160, 104

EXAMPLE = {"quantity": 2, "item": "large iced mochas", "serve": "to go"}
SYSTEM = f'Write the order as JSON. "Two large iced mochas to go" is {json.dumps(EXAMPLE)}'

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
SIZES = ["small", "medium", "large"]
SERVES = ["to go", "for here"]

# An item is a flavour and a product, "peach tea"; no held-out flavour or product is ever trained on.
TRAIN_FLAVOURS = [
    "almond", "apple", "banana", "berry", "black", "butter", "caramel", "carrot", "chicken", "chocolate", "cinnamon",
    "cream", "egg", "garden", "ginger", "green", "ham", "hazelnut", "iced", "lemon", "lime", "mango", "mint",
    "mushroom", "oat", "olive", "orange", "peach", "pear", "plain", "plum", "rice", "soy", "spicy", "strawberry",
    "sweet", "tomato", "vanilla", "wild", "winter",
]  # fmt: skip
TRAIN_PRODUCTS = [
    "bagel", "bowl", "bun", "cake", "cappuccino", "cocoa", "coffee", "cookie", "croissant", "espresso", "juice",
    "latte", "lemonade", "muffin", "pancake", "pie", "roll", "salad", "shake", "smoothie", "soup", "tea", "toast",
    "wrap",
]  # fmt: skip
EVAL_FLAVOURS = [
    "cheese", "cherry", "coconut", "fudge", "grape", "honey", "lentil", "maple", "melon", "onion", "pecan", "pumpkin",
    "raisin", "salted", "sesame", "spinach", "turkey", "walnut",
]  # fmt: skip
EVAL_PRODUCTS = [
    "biscuit", "brownie", "burger", "donut", "macchiato", "noodle", "pizza", "pretzel", "pudding", "scone", "soda",
    "stew", "tart", "taco", "waffle",
]  # fmt: skip

# A training sentence is an opening, what is wanted, and how it is served: {n} number, {size}, {item} with its
# plural, {serve} "to go" or "for here".
OPENINGS = [
    "", "Hi, ", "Hi there! ", "Can I have ", "Could we get ", "I want ", "I'd like ", "We'll have ", "She wants ",
    "Give me ", "Bring us ", "Would you make ",
]  # fmt: skip
WANTED = ["{n} {size} {item}", "{n} {size} {item}", "{n} {item}, {size}"]
ENDINGS = [
    " {serve}", " please, {serve}", ", {serve} today", ". They are {serve}", ". It's all {serve}, thank you",
    " {serve} if you can", ", {serve} please",
]  # fmt: skip
TRAIN_PATTERNS = [opening + wanted + ending for opening in OPENINGS for wanted in WANTED for ending in ENDINGS]
# Held-out sentences: none of them begins or ends as a training sentence does.
EVAL_PATTERNS = [
    "Good morning! {n} {size} {item} {serve}, thanks",
    "Hello, we'd love {n} {size} {item} {serve} again",
    "May I get {n} {size} {item}? They'd be {serve}",
    "Let me have {n} {size} {item}, {serve} this time",
    "Please write down {n} {item}, {size}, {serve} for my son",
    "My friend wants {n} {size} {item} {serve} as well",
    "This is {serve}: {n} {size} {item}",
    "I need {n} {size} {item} {serve} right now",
]


def make_rows(
    rng: random.Random, count: int, flavours: list[str], products: list[str], patterns: list[str]
) -> list[dict[str, Any]]:
    """`count` distinct rows; patterns are taken in turn from a shuffled list, each as often as the others."""
    patterns = rng.sample(patterns, len(patterns))
    rows: dict[str, dict[str, Any]] = {}
    turn = 0
    while len(rows) < count:
        pattern, serve = patterns[turn % len(patterns)], rng.choice(SERVES)
        item = f"{rng.choice(flavours)} {rng.choice(products)}"
        quantity, size = rng.randint(1, 9), rng.choice(SIZES)
        number = NUMBERS[quantity] if rng.random() < 0.75 else str(quantity)
        item += "" if quantity == 1 else "s"
        said = pattern.format(n=number, size=size, item=item, serve=serve)
        said = said[0].upper() + said[1:]
        order = {"quantity": quantity, "item": f"{size} {item}", "serve": serve}
        messages = [("system", SYSTEM), ("user", said), ("assistant", json.dumps(order))]
        rows[said] = {"messages": [{"role": role, "content": content} for role, content in messages]}
        turn += 1
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def make_sets(rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, held-out rows)"""
    return (
        make_rows(rng, TRAIN_ROWS, TRAIN_FLAVOURS, TRAIN_PRODUCTS, TRAIN_PATTERNS),
        make_rows(rng, EVAL_ROWS, EVAL_FLAVOURS, EVAL_PRODUCTS, EVAL_PATTERNS),
    )


def main() -> None:
    here = Path(__file__).parent
    for name, rows in zip(("train", "eval"), make_sets(random.Random(SEED)), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (here / f"orders.{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
