r"""How .gguf files name the rules by which text is cut into words, before byte-pair encoding.

`tokenizer.ggml.pre` is a name from llama.cpp. Where that approximates a model's own expressions, since its engine does
not tell \p{Lu} from \p{L}, those of the model stand here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """Text is cut around every match of the first pattern, the pieces around those of the next, and so on."""

    patterns: tuple[str, ...]
    nfc: bool = False
    """Whether the model's tokenizer composes characters first (Unicode's NFC)."""
    ignore_merges: bool = False
    """Whether a word that is a token is that token, whatever the merges would make of it."""
    add_bos: bool = False
    """Whether text begins with the BOS token where the file does not say."""


def _either(*patterns: str) -> str:
    return "|".join(patterns)


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LINES = r"\s*[\r\n]+"
BLANKS = r"\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _either(CONTRACTION, WORD, r"\p{N}{1,3}", SYMBOLS, LINES, BLANKS)
QWEN2 = _either(CONTRACTION, WORD, r"\p{N}", SYMBOLS, LINES, BLANKS)

# Words that begin anew at a capital.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CAPITALISED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
GPT4O_WORDS = tuple(f"{word}{CONTRACTION}?" for word in CAPITALISED)
SYMBOLS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
GPT4O = _either(*GPT4O_WORDS, r"\p{N}{1,3}", SYMBOLS_AND_SLASHES, LINES, BLANKS)

CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
AFTER_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
DEEPSEEK_WORDS = AFTER_PUNCTUATION, r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
DEEPSEEK_V3 = Split(
    (r"\p{N}{1,3}", CJK, _either(*DEEPSEEK_WORDS, r" ?[\p{P}\p{S}]+[\r\n]*", LINES, BLANKS)),
)
CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-"
    "ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌ"
    "ῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-"
    "ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
CJK_AND_HANGUL = "[一-龥\u0800-一가-\ud7ff]+"
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

FALCON = r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"
DIGITS_THEN_GPT2 = Split((r"\p{N}", GPT2))
LLAMA_BPE = Split((LLAMA3,), ignore_merges=True, add_bos=True)


def _same(split: Split, *names: str) -> dict[str, Split]:
    return dict.fromkeys(names, split)


SPLITS = {
    "default": Split((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **_same(
        Split((GPT2,)),
        *("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-code", "jina-v2-de", "jina-v2-es", "gigachat"),
        *("roberta-bpe", "a.x-4.0", "mellum", "modern-bert", "jais", "trillion", "granite-docling", "exaone4"),
    ),
    **_same(Split((GPT2,), nfc=True), "mpt", "olmo"),
    **_same(DIGITS_THEN_GPT2, "smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "command-r": Split((r"\p{N}", GPT2), nfc=True),
    "falcon": Split(FALCON),
    **_same(LLAMA_BPE, "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "jina-v5-nano": LLAMA_BPE,
    **_same(Split((LLAMA3,)), "dbrx", "smaug-bpe", "chatglm-bpe"),
    **_same(Split((LLAMA3,), ignore_merges=True), "glm4", "glm5"),
    "jais-2": Split(
        (
            _either(CONTRACTION, WORD, r"\p{N}{1,3}", SYMBOLS, LINES)
            + "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4))
            + r"|\s{1,2}(?!\S)|\s{1}",
        )
    ),
    "minicpm5": Split(
        (r"\p{N}{1,3}", _either(CONTRACTION, WORD, r"\p{N}+", SYMBOLS, LINES, BLANKS)), ignore_merges=True
    ),
    **_same(Split((QWEN2,), nfc=True), "qwen2", "deepseek-r1-qwen", "f2llmv2"),
    **_same(Split((QWEN2,)), "kormo", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    "qwen35": Split(  # whose model composes, too; but the ids that llama.cpp expects in its tests are of text as it is
        (
            _either(
                *(CONTRACTION, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),
                *(LINES, BLANKS),
            ),
        )
    ),
    "laguna": Split((r"[^\n]+|[\n]+", QWEN2)),
    "ufakzeka": Split((_either(WORD, r"\p{N}", SYMBOLS, LINES, BLANKS),)),
    "seed-coder": Split((_either(CONTRACTION, WORD, r"\p{N}{1}", r" ?[^\s\p{L}\p{N}\r\n]+", LINES, BLANKS),)),
    **_same(
        Split(
            (
                _either(
                    *(r"'(?i:[sdmt]|ll|ve|re)", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]++[\r\n]*"),
                    *(r"\s*[\r\n]", BLANKS),
                ),
            )
        ),
        *("bailingmoe", "bailingmoe2", "llada-moe"),
    ),
    "exaone-moe": Split(
        (
            _either(
                *(CONTRACTION, r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+", r"\p{N}"),
                *(r" ?[^\s\p{L}\p{N}]+[\r\n/]?", r"\s*[\r\n]", BLANKS),
            ),
        )
    ),
    "tekken": Split(
        (_either(*CAPITALISED, r"\p{N}", SYMBOLS_AND_SLASHES, LINES, BLANKS),), ignore_merges=True, add_bos=True
    ),
    **_same(Split((GPT4O,)), "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    "granite-embed-multi-97m": Split((GPT4O,), ignore_merges=True),
    **_same(Split((r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O)), "tiny_aya", "cohere2moe"),
    "youtu": Split(
        (
            _either("[가-힣ㄱ-ㆎ]+", "[！…“”‘’—：；，、-〿︰-﹏]+", "[ㄅ-ㄯ]+", CJK),
            _either(*GPT4O_WORDS, r"\p{N}", SYMBOLS_AND_SLASHES, LINES, BLANKS),
        ),
        ignore_merges=True,
    ),
    "deepseek-llm": Split(
        ("[\r\n]", rf"\s?[{CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK_AND_HANGUL, r"\p{N}+")
    ),
    "deepseek-coder": Split(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK_AND_HANGUL, r"\p{N}")),
    **_same(DEEPSEEK_V3, "deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
    "spark2_5": Split(
        (r"\p{N}{1,3}", CJK, _either(*DEEPSEEK_WORDS, r" ?[\p{P}\p{S}]+", r"[\r\n]", BLANKS), r"\p{N}"),
    ),
    **_same(Split((BLOOM,)), "bloom", "gpt3-finnish", "poro-chat"),
    "viking": Split((BLOOM, r"\p{N}")),
    "superbpe": Split((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "chameleon": Split(
        (
            *("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", r"\p{N}"),
            *(r"[\p{P}!-/:-@\[-`{-~]", GPT2),
        ),
        add_bos=True,
    ),
}
"""The rules by the name that `tokenizer.ggml.pre` gives them."""
