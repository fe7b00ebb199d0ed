"""The claims of the paper and ours, and how each is judged from the records of `bench/paper.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paper_plan import TAUS
from paper_points import Results
from shares import FAILS, HOLDS, WITHIN_NOISE, Share, collapses, difference, gap, verdict

Finding = tuple[str, str]  # verdict, figures
Judge = Callable[[Results], Finding]


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or of ours, and how it is judged.

    Attributes:
        number: as this project counts them, or "ours".
        text: the claim.
        paper: the paper's figures.
        brief: the claim in a few words, for the first lines of the page.
        judge: the verdict and our figures, from the records.
    """

    number: str
    text: str
    paper: str
    brief: str
    judge: Judge


CLAIMS: list[Claim] = []


def claim(number: str, text: str, paper: str, brief: str) -> Callable[[Judge], Judge]:
    """Register a claim."""

    def register(judge: Judge) -> Judge:
        CLAIMS.append(Claim(number, text, paper, brief, judge))
        return judge

    return register


def worst(*verdicts: str) -> str:
    """The weakest of several verdicts: a claim holds if all its parts do."""
    return max(verdicts, key=(HOLDS, WITHIN_NOISE, FAILS).index)


def holds_if(is_so: bool) -> str:
    """The verdict of what is so, or is not: it cannot be within noise."""
    return HOLDS if is_so else FAILS


def no_worse(a: Share, b: Share) -> str:
    """Whether it holds that b is not more accurate than a."""
    return holds_if(verdict(b, a) != HOLDS)


def part_of(some: int, whole: int) -> float:
    """A share; of nothing, 0: who judges by it looks at the whole first."""
    return some / whole if whole else 0.0


@claim(
    "17",
    "The base model collapses as its threshold falls",
    "92.6, 78.0, 0.9 % at 0.95, 0.5, 0",
    brief="the base model collapses when pushed",
)
def _(r: Results) -> Finding:
    careful, middle, bold = (r.at("base, threshold", value) for value in (0.95, 0.5, 0.0))
    return holds_if(collapses(bold, careful)), f"{careful}; {middle}; {bold}"


@claim(
    "18",
    "SPD on the base model, without OPUT, collapses at every threshold",
    "0.0 % at TPF 1.04, 1.73, 5.39",
    brief="so does SPD on the base model",
)
def _(r: Results) -> Finding:
    careful = r.at("base, threshold", 0.95)
    shares = [r.at("base, SPD", value) for value in TAUS]
    is_everywhere = all(collapses(share, careful) for share in shares)
    return holds_if(is_everywhere), "; ".join(map(str, shares))


@claim(
    "19",
    "OPUT alone, hard tokens: no loss at 0.95, a gain at 0.5",
    "92.6 at 0.95, 90.1 against 78.0 at 0.5",
    brief="OPUT gains with hard tokens too",
)
def _(r: Results) -> Finding:
    name = "DMax, hard tokens, no prefix rule"
    careful = r.at(name, 0.95)
    bold = r.at(name, 0.5)
    kept = no_worse(careful, r.at("base, threshold", 0.95))
    return worst(kept, verdict(bold, r.at("base, threshold", 0.5))), f"{careful}; {bold}"


@claim(
    "20",
    "At threshold 0, soft inputs keep what hard tokens lose",
    "90.4 against 68 to 70 %",
    brief="soft inputs help at threshold 0",
)
def _(r: Results) -> Finding:
    soft = r.at("DMax, SPD", 0.0)
    hard = r.at("DMax, hard tokens", 0.0)
    return verdict(soft, hard), f"soft {soft}; hard {hard}: {gap(soft, hard)}"


@claim(
    "21",
    "At mild thresholds soft and hard differ little",
    "93.3 against 93.0, 92.1 against 91.3",
    brief="soft and hard inputs are alike at mild thresholds",
)
def _(r: Results) -> Finding:
    pairs = [(r.at("DMax, SPD", value), r.at("DMax, hard tokens", value)) for value in (0.95, 0.5)]
    little = all(abs(difference(*pair)[0]) <= 2 for pair in pairs)
    return holds_if(little), "; ".join(f"soft {a}, hard {b}: {gap(a, b)}" for a, b in pairs)


@claim(
    "22",
    "The prefix rule trades TPF for accuracy at 0.5",
    "5.64 / 91.4 without, 5.48 / 92.1 with it",
    brief="the prefix rule trades TPF for accuracy",
)
def _(r: Results) -> Finding:
    with_rule = r.at("DMax, SPD", 0.5)
    without = r.at("DMax, no prefix rule", 0.5)
    trade = verdict(with_rule, without) if with_rule.tpf < without.tpf else FAILS
    return trade, f"with {with_rule}; without {without}: {gap(with_rule, without)}"


@claim(
    "23",
    "Random-token training is worse than OPUT, and oscillates",
    "68.7 % at TPF 2.26",
    brief="random tokens are worse than OPUT",
)
def _(r: Results) -> Finding:
    oput = r.pooled("sampled rollouts", "hard tokens", 0.5)
    random = r.pooled("random tokens", "hard tokens", 0.5)
    rates = {
        n: r.measures[f"revisions, hard tokens, {n}"] for n in ("sampled rollouts", "random tokens")
    }
    flips = {n: 100 * part_of(m["changes"], m["chances"]) for n, m in rates.items()}
    is_steadier = flips["random tokens"] > flips["sampled rollouts"]
    found = verdict(oput, random) if is_steadier else FAILS
    if not all(m["chances"] for m in rates.values()):
        found = WITHIN_NOISE
    shown = ", ".join(f"{n} {value:.1f} %" for n, value in flips.items())
    return (
        found,
        f"OPUT {oput}; random tokens {random}. Decoded tokens that change at a forward: {shown}",
    )


@claim(
    "24",
    "Stopping on confidence alone costs TPF, on consistency alone a little",
    "5.48; 2.28 and 5.13",
    brief="each stop rule by itself costs TPF",
)
def _(r: Results) -> Finding:
    both, consistent, confident = (
        r.at(name, 0.5)
        for name in ("DMax, SPD", "DMax, consistency stop alone", "DMax, confidence stop alone")
    )
    costs = holds_if(confident.tpf < consistent.tpf < both.tpf)
    return costs, f"both {both}; consistency alone {consistent}; confidence alone {confident}"


@claim(
    "25",
    "OPUT raises TPF at the same threshold of 0.95",
    "2.04 to 2.95, with no control",
    brief="OPUT raises TPF at the same threshold",
)
def _(r: Results) -> Finding:
    base = r.at("base, threshold", 0.95)
    oput = r.pooled("sampled rollouts", "threshold", 0.95)
    return holds_if(oput.tpf > base.tpf), f"base {base}; OPUT {oput}"


@claim(
    "ours",
    "Without the noise, masks only, TPF rises less at the same threshold of 0.95",
    "the missing control of 25",
    brief="the gain of 25 is due to the noise",
)
def _(r: Results) -> Finding:
    oput, masks = (r.pooled(name, "threshold", 0.95) for name in ("sampled rollouts", "masks only"))
    rises_less = holds_if(oput.tpf > masks.tpf)
    return rises_less, f"OPUT {oput}; masks only {masks}: {gap(oput, masks)}"


@claim(
    "26",
    "At equal TPF DMax dominates, and when careful it is no worse than the base",
    "+0.8 to +3.0 points",
    brief="DMax beats the base at equal TPF",
)
def _(r: Results) -> Finding:
    base = r.at("base, threshold", 0.95)
    careful = r.at("DMax, SPD", 0.7)
    bold = r.at("DMax, SPD", 0.5)
    pushed = r.at("base, threshold", 0.3)
    dominates = worst(no_worse(careful, base), verdict(bold, pushed))
    return dominates, f"base {base}, pushed {pushed}; DMax {careful}, pushed {bold}"


@claim(
    "27",
    "Blends need their length restored",
    "asserted, not measured",
    brief="blends need their length restored",
)
def _(r: Results) -> Finding:
    pairs = [(r.at("DMax, SPD", value), r.at("DMax, no renormalisation", value)) for value in TAUS]
    return worst(*(verdict(*pair) for pair in pairs)), "; ".join(
        f"with {a}, without {b}" for a, b in pairs
    )


@claim(
    "27",
    "More candidates in a blend (top-k 2, 4) help",
    "an option of the code, not measured",
    brief="more candidates in a blend help",
)
def _(r: Results) -> Finding:
    one, two, four = (r.at(name, 0.5) for name in ("DMax, SPD", "DMax, top-k 2", "DMax, top-k 4"))
    return worst(verdict(two, one), verdict(four, one)), f"k = 1 {one}; 2 {two}; 4 {four}"


@claim(
    "28",
    "A forward of SPD takes 10 to 20 % longer",
    "4.4 ms in place of 4.0",
    brief="a forward of SPD takes 10 to 20 % longer",
)
def _(r: Results) -> Finding:
    measured = r.measures["forward times"]
    low = min(measured["ratios"])
    high = max(measured["ratios"])
    return (
        holds_if(1.1 <= measured["ratio"] <= 1.2),
        f"{measured['ratio']:.2f} times as long on a CPU at batch 1 ({low:.2f} to {high:.2f})",
    )


@claim(
    "29",
    "OPUT mends more wrong tokens than the base, and breaks fewer right ones than random tokens",
    "figure",
    brief="OPUT mends more than the base and breaks less than random tokens",
)
def _(r: Results) -> Finding:
    counts = {
        n: r.measures[f"corrections, {n}"] for n in ("base", "random tokens", "sampled rollouts")
    }
    mended = {n: part_of(c["mended"], c["wrong"]) for n, c in counts.items()}
    broken = {n: part_of(c["broken"], c["right"]) for n, c in counts.items()}
    oput = "sampled rollouts"
    good = (
        mended[oput] > max(mended["base"], mended["random tokens"])
        and broken[oput] < broken["random tokens"]
    )
    shown = "; ".join(
        f"{n}: mended {c['mended']}/{c['wrong']} ({100 * mended[n]:.1f} %), "
        f"broken {c['broken']}/{c['right']} ({100 * broken[n]:.1f} %)"
        for n, c in counts.items()
    )
    if not all(c["wrong"] and c["right"] for c in counts.values()):
        return WITHIN_NOISE, shown
    return holds_if(good), shown


@claim(
    "ours",
    "Sampled rollouts are as good as the published argmax ones",
    "not measured",
    brief="sampled rollouts are as good as argmax",
)
def _(r: Results) -> Finding:
    pairs = [
        (r.pooled("sampled rollouts", "SPD", t), r.pooled("argmax rollouts", "SPD", t))
        for t in (0.5, 0.0)
    ]
    as_good = worst(*(no_worse(a, b) for a, b in pairs))
    return as_good, "; ".join(f"sampled {a}, argmax {b}: {gap(a, b)}" for a, b in pairs)


@claim(
    "ours",
    "A mask ratio of 0.75 is better than 0.5 and than 1",
    "0.75, not varied",
    brief="a mask ratio of 0.75 is best",
)
def _(r: Results) -> Finding:
    names = ("sampled rollouts", "mask ratio 0.5", "mask ratio 1")
    middle, low, high = (r.pooled(name, "SPD", 0.5) for name in names)
    return worst(verdict(middle, low), verdict(middle, high)), f"0.75 {middle}; 0.5 {low}; 1 {high}"


@claim(
    "ours",
    "Pushed, OPUT is better than the same data with masks only at about equal TPF",
    "the missing control",
    brief="OPUT beats masks only on the same data when pushed",
)
def _(r: Results) -> Finding:
    oput = r.pooled("sampled rollouts", "SPD", 0.0)
    masks = r.pooled("masks only", "SPD", 0.5)
    careful = r.pooled("masks only", "threshold", 0.95)
    return (
        verdict(oput, masks),
        f"OPUT, SPD at 0 {oput}; masks only, SPD at 0.5 {masks}: {gap(oput, masks)}. Careful, "
        f"masks only has {careful}",
    )
