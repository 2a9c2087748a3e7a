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
TRAIN_ROWS, EVAL_ROWS = 200, 120

EXAMPLE = {"quantity": 2, "item": "large iced mochas", "to_go": True}
SYSTEM = f'Write the order as JSON. "Two large iced mochas to go" is {json.dumps(EXAMPLE)}'

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
SIZES = ["small", "medium", "large"]

# An item is a flavour and a product, "peach tea"; no held-out flavour or product is ever trained on.
TRAIN_FLAVOURS = [
    "almond", "apple", "banana", "berry", "black", "butter", "caramel", "carrot", "chicken", "chocolate", "cinnamon",
    "cream", "egg", "garden", "ginger", "green", "ham", "hazelnut", "iced", "lemon", "lime", "mango", "mint",
    "mushroom", "oat", "olive", "orange", "peach", "pear", "plain", "plum", "rice", "soy", "spicy", "strawberry",
    "sweet", "tomato", "vanilla", "wild", "winter",
]  # fmt: skip
TRAIN_PRODUCTS = [
    "bagel", "bowl", "bun", "cake", "cappuccino", "cocoa", "coffee", "cookie", "croissant", "espresso", "juice",
    "latte", "lemonade", "muffin", "pancake", "pie", "roll", "salad", "shake", "smoothie", "soup", "tea", "toast", "wrap",
]  # fmt: skip
EVAL_FLAVOURS = [
    "cheese", "cherry", "coconut", "fudge", "grape", "honey", "lentil", "maple", "melon", "onion", "pecan", "pumpkin",
    "raisin", "salted", "sesame", "spinach", "turkey", "walnut",
]  # fmt: skip
EVAL_PRODUCTS = [
    "biscuit", "brownie", "burger", "donut", "macchiato", "noodle", "pizza", "pretzel", "pudding", "scone", "soda",
    "stew", "tart", "taco", "waffle",
]  # fmt: skip

# {n} number, {size}, {item} with its plural s; "to go" or "here" decides to_go.
TRAIN_PATTERNS = [
    ("{n} {size} {item} to go", True),
    ("{n} {size} {item} for here", False),
    ("Hi, {n} {size} {item} please, to go", True),
    ("Hi there, {n} {size} {item}, we are eating in", False),
    ("Can I have {n} {size} {item} to go?", True),
    ("Can I have {n} {size} {item}? I'll eat here", False),
    ("Could we get {n} {size} {item} to take away?", True),
    ("Could I get {n} {size} {item}? It's for here", False),
    ("I want {n} {item}, {size}, to go", True),
    ("I'd like {n} {size} {item}, for here please", False),
    ("To go please: {n} {size} {item}, as fast as you can", True),
    ("For here: {n} {item}, {size}", False),
    ("She wants {n} {size} {item} to go, thank you", True),
    ("We'll have {n} {size} {item} at the table", False),
    ("{n} {item} to take with me, {size} please", True),
    ("{n} {item}, {size} ones, at our table", False),
    ("I have to run, so {n} {size} {item} to go today", True),
    ("Give me {n} {size} {item}, eating in", False),
    ("Would you pack {n} {size} {item}? They are to go", True),
    ("Bring {n} {size} {item} to our table please", False),
]
EVAL_PATTERNS = [
    ("Good morning! {n} {size} {item} to go, thanks", True),
    ("Hello, we'd like {n} {size} {item} for here", False),
    ("May I get {n} {size} {item}? They're to go", True),
    ("Let me have {n} {size} {item}, and I'll eat here", False),
    ("Please make it {n} {item}, {size}, to take away", True),
    ("My friend wants {n} {size} {item}, eating in", False),
    ("For the table, {n} {size} {item} please", False),
    ("I need {n} {size} {item} to go right now", True),
]


Pattern = tuple[str, bool]


def make_rows(
    rng: random.Random, count: int, flavours: list[str], products: list[str], patterns: list[Pattern]
) -> list[dict[str, Any]]:
    """`count` distinct rows; patterns are taken in turn, so that each is seen equally often."""
    rows: dict[str, dict[str, Any]] = {}
    turn = 0
    while len(rows) < count:
        pattern, to_go = patterns[turn % len(patterns)]
        item = f"{rng.choice(flavours)} {rng.choice(products)}"
        quantity, size = rng.randint(1, 9), rng.choice(SIZES)
        number = NUMBERS[quantity] if rng.random() < 0.75 else str(quantity)
        item += "" if quantity == 1 else "s"
        said = pattern.format(n=number, size=size, item=item)
        said = said[0].upper() + said[1:]
        order = {"quantity": quantity, "item": f"{size} {item}", "to_go": to_go}
        messages = [("system", SYSTEM), ("user", said), ("assistant", json.dumps(order))]
        rows[said] = {"messages": [{"role": role, "content": content} for role, content in messages]}
        turn += 1
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def main() -> None:
    rng = random.Random(SEED)
    here = Path(__file__).parent
    sets = {
        "train": make_rows(rng, TRAIN_ROWS, TRAIN_FLAVOURS, TRAIN_PRODUCTS, TRAIN_PATTERNS),
        "eval": make_rows(rng, EVAL_ROWS, EVAL_FLAVOURS, EVAL_PRODUCTS, EVAL_PATTERNS),
    }
    for name, rows in sets.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (here / f"orders.{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
