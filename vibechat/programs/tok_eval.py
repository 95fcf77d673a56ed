"""Compare how tightly the tokenizer packs text with GPT-2 and GPT-4.

Compression is bytes of UTF-8 a token; fewer tokens for the same text mean a longer context and fewer steps. The samples
below were written for this table; `train` and `val` are the dataset that `--data` names.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vibechat.common import UserError
from vibechat.configurator import run_program
from vibechat.dataset import open_dataset
from vibechat.report import get_report
from vibechat.tokenizer import RustBPETokenizer, get_tokenizer

BASELINES = ("gpt2", "cl100k_base")

SAMPLES = {
    "news": """\
The harbour authority said on Tuesday that the new breakwater, delayed for three years by disputes over its cost, would
open before the autumn storms. Residents of the lower town, who were flooded twice last winter, welcomed the decision;
fishermen were more cautious. "We have been promised a safe harbour since 2009," said one skipper, who has kept his boat
at a mooring upriver. The council estimates that the works will have cost 48.6 million by the time they are finished,
about 20% more than planned, and that a toll on pleasure craft will recover some of the difference. A spokeswoman for
the regional government declined to comment on reports that a second contractor had withdrawn.
""",
    "code": '''\
def longest_common_prefix(words: list[str]) -> str:
    """The longest string that every word begins with; empty for no words."""
    if not words:
        return ""
    first, last = min(words), max(words)  # what these two share, all share
    for i, (a, b) in enumerate(zip(first, last)):
        if a != b:
            return first[:i]
    return first


class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self._balance = balance

    @property
    def balance(self):
        return self._balance

    def withdraw(self, amount):
        if amount > self._balance:
            raise ValueError(f"{self.owner} has only {self._balance:.2f}")
        self._balance -= amount

for (let i = 0; i < items.length; i++) { total += items[i].price * (1 - items[i].discount ?? 0); }
SELECT name, COUNT(*) AS n FROM orders WHERE created_at >= '2024-01-01' GROUP BY name HAVING n > 10;
''',
    "math": r"""\
Let $f : \mathbb{R} \to \mathbb{R}$ be continuous with $f(x + y) = f(x) + f(y)$ for all $x, y$. Then $f(x) = x f(1)$:
by induction $f(n) = n f(1)$ for $n \in \mathbb{N}$, so $f\left(\tfrac{p}{q}\right) = \tfrac{p}{q} f(1)$, and rationals
are dense. For the series, $\sum_{k=0}^{n} \binom{n}{k} x^k y^{n-k} = (x + y)^n$ gives, with $x = y = 1$, exactly
$2^{10} = 1024$ subsets of a set of 10 elements. A train that covers 357 km in 4 h 15 min runs at 357 / 4.25 = 84 km/h;
12,345 + 67,890 = 80,235 and 0.125 * 64 = 8. The integral $\int_0^1 x^2 e^{-x}\,dx = 2 - 5/e \approx 0.1606$.
""",
    "German": """\
Die Bibliothek schließt um acht, sagte die Frau am Schalter, und wer dann noch drinnen sitzt, der bleibt bis morgen
früh. Er glaubte ihr nicht. Zwischen den Regalen roch es nach Staub und kaltem Kaffee; draußen fuhren die letzten
Straßenbahnen über die Brücke. Er schlug das Buch auf, das er seit Jahren hatte lesen wollen, eine Geschichte der
Vermessung der nördlichen Küsten, und vergaß die Uhr, den Zug und die Verabredung.
""",
    "Russian": """\
Утром снег ещё лежал на крышах, но к полудню с карнизов потекло, и дворник, ругаясь, отгородил тротуар верёвкой.
Старик из третьего подъезда вышел посмотреть на реку: лёд потемнел, но стоял крепко. Он помнил другие вёсны, когда
мост сносило водой и город неделю жил по разные стороны, переправляя на лодках хлеб, письма и врача.
""",
    "Chinese": """\
清晨的市场已经热闹起来了。卖豆腐的老人把木板擦得干干净净,旁边的姑娘正在给一筐青菜洒水。孩子们背着书包从人群中穿过,
有的停下来看金鱼,有的只顾着吃手里的包子。下过雨的石板路还很滑,骑自行车的人都放慢了速度。到了八点钟,阳光照进巷子,
整条街都闻得到新磨咖啡和油条的香味。
""",
    "Arabic": """\
كان البيت القديم يقع عند طرف القرية، تحيط به أشجار الزيتون من ثلاث جهات. في المساء يجتمع الجيران أمام الباب، يشربون
الشاي ويتحدثون عن المطر والحصاد وأخبار المدينة البعيدة. أما الأطفال فكانوا ينتظرون جدتهم لتكمل الحكاية التي بدأتها
في الليلة الماضية عن الملاح الذي ضاع في البحر.
""",
    "Hindi": """\
गाँव के बाहर एक पुराना कुआँ था, जिसके पास बरगद का बड़ा पेड़ खड़ा था। गर्मियों की दोपहर में सब लोग उसी की छाया में बैठते थे।
बच्चे खेलते, बूढ़े कहानियाँ सुनाते, और औरतें पानी भरते हुए दिन भर की बातें करती थीं। एक दिन वहाँ एक अजनबी यात्री आकर रुका।
""",
    "emoji": """\
Good morning! ☀️ Who's coming to the picnic? 🧺🥪🍓 I'll bring the 🎸 and @lena brings 🐶🐶 lol 😂😂😂 #weekend
okay 👍🏽 see you at 11 ⏰ … unless it rains 🌧️☔ then 🎬🍿 at my place?? ❤️🙌 👨‍👩‍👧‍👦🏳️‍🌈 ¯\\_(ツ)_/¯ ✨✨✨
""",
}


@dataclass(frozen=True)
class Config:
    """What `vibechat tok-eval` takes."""

    data: str = "builtin"
    """builtin, fineweb-edu, climbmix, or globs of parquet, jsonl and txt files"""
    text_column: str = "text"
    """the column or field that holds the text"""
    max_chars: int = 4_000_000
    """compare on so many characters of each split"""

    def __post_init__(self) -> None:
        if self.max_chars < 1:
            raise ValueError(f"--max-chars {self.max_chars}: must be positive")


def load_baselines() -> tuple[dict[str, RustBPETokenizer], list[str]]:
    """The baselines that are to be had, and a line about those that are not."""
    found: dict[str, RustBPETokenizer] = {}
    missing: dict[str, UserError] = {}
    for name in BASELINES:
        try:
            found[name] = RustBPETokenizer.from_pretrained(name)
        except UserError as error:
            missing[name] = error
    notes = []
    if missing:
        first = next(iter(missing.values()))
        notes = [f"note: not compared with {' and '.join(missing)}: {first}"]
    return found, notes


def count_tokens(tokenizer: RustBPETokenizer, texts: list[str]) -> int:
    """How many tokens the texts make. Raises UserError if decoding them does not give the texts back."""
    encoded = tokenizer.encode(texts, num_threads=0)
    for text, ids in zip(texts, encoded, strict=True):
        if tokenizer.decode_bytes(ids) != text.encode("utf-8", errors="replace"):
            raise UserError(f"the tokenizer does not give back the text that begins with {text[:40]!r}")
    return sum(map(len, encoded))


def compare(texts: dict[str, list[str]], tokenizers: dict[str, RustBPETokenizer]) -> list[dict[str, str]]:
    """A row for each kind of text: its bytes, each tokenizer's bytes a token, our tokens against each baseline's."""
    ours, *baselines = tokenizers
    rows = []
    for kind, documents in texts.items():
        size = sum(len(text.encode("utf-8", errors="replace")) for text in documents)
        tokens = {name: max(count_tokens(tokenizer, documents), 1) for name, tokenizer in tokenizers.items()}
        row = {"text": kind, "bytes": f"{size:,}", ours: f"{size / tokens[ours]:.3f}"}
        for name in baselines:
            row[name] = f"{size / tokens[name]:.3f}"
            row[f"ours vs {name}"] = f"{tokens[ours] / tokens[name] - 1:+.1%}"
        rows.append(row)
    return rows


def table(rows: list[dict[str, str]]) -> Iterable[str]:
    """Rows as lines of aligned text; numbers to the right."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]
    for row in [dict(zip(names, names, strict=True)), *rows]:
        cells = [
            row[name].ljust(width) if name == "text" else row[name].rjust(width)
            for name, width in zip(names, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def evaluate(config: Config) -> None:
    """Compare, print the table, and put it into the report."""
    tokenizer = get_tokenizer()
    baselines, notes = load_baselines()
    dataset = open_dataset(config.data, text_column=config.text_column)
    texts = {kind: [text] for kind, text in SAMPLES.items()}
    for split in ("train", "val"):
        texts[f"{dataset.name} {split}"] = list(dataset.iter_texts(split, config.max_chars))
    rows = compare(texts, {"ours": tokenizer, **baselines})
    sizes = [f"ours {tokenizer.get_vocab_size():,}", *(f"{n} {t.get_vocab_size():,}" for n, t in baselines.items())]
    lines = [f"bytes a token (more is better); vocabularies: {', '.join(sizes)}"]
    if baselines:
        lines.append("ours vs: how many tokens more or fewer ours takes for the same text")
    page = "\n".join(table(rows))
    print("\n".join([*lines, "", page, *notes]))
    get_report().log("Tokenizer evaluation", [*lines, f"```\n{page}\n```", *notes])


def main(argv: list[str] | None = None) -> int:
    """Read the command line, compare, return the exit status."""
    return run_program(evaluate, Config, argv, prog="vibechat tok-eval", description=(__doc__ or "").partition("\n")[0])


if __name__ == "__main__":
    raise SystemExit(main())
