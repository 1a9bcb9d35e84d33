"""The pre-tokenizers that `tokenizer.ggml.pre` names: how text is split before a byte-level vocabulary merges it.

The names are llama.cpp's, and so are the splits, with one exception. Where its regular expressions know no upper case
beyond ASCII, no combining marks or no groups of three digits (gpt-4o, tekken, tiny_aya, afmoe and their relatives), the
split is the one that the model was published with.
"""

from __future__ import annotations

from dataclasses import dataclass

# parts of the patterns below
CONTRACTION = "'s|'t|'re|'ve|'m|'ll|'d"
CONTRACTION_ANY_CASE = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SIGNS_AND_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
LINE_ENDS = r"\s*[\r\n]+"
SPACES = r"\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CASED_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+"
UPPER_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*"
PUNCTUATED_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DIGITS_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
# the letters that have a case, as they were when deepseek-llm was published
CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-"
    "\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-"
    "\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
    "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-"
    "\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-"
    "\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

# whole patterns
GPT2 = rf"{CONTRACTION}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"
LLAMA3 = "|".join((CONTRACTION_ANY_CASE, WORD, r"\p{N}{1,3}", SIGNS, LINE_ENDS, SPACES))
QWEN2 = "|".join((CONTRACTION_ANY_CASE, WORD, r"\p{N}", SIGNS, LINE_ENDS, SPACES))
TEKKEN = "|".join((CASED_WORD, UPPER_WORD, r"\p{N}", SIGNS_AND_SLASH, LINE_ENDS, SPACES))
GPT4O = "|".join(
    (
        f"{CASED_WORD}{CONTRACTION_ANY_CASE}?",
        f"{UPPER_WORD}{CONTRACTION_ANY_CASE}?",
        r"\p{N}{1,3}",
        SIGNS_AND_SLASH,
        LINE_ENDS,
        SPACES,
    )
)
DEEPSEEK3_WORDS = "|".join((PUNCTUATED_WORD, r" ?[\p{P}\p{S}]+[\r\n]*", LINE_ENDS, SPACES))
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
NOT_HAN = r"&&[^\p{Han}]"
KIMI = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}{NOT_HAN}]*[{LOWER}{NOT_HAN}]+{CONTRACTION_ANY_CASE}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}{NOT_HAN}]+[{LOWER}{NOT_HAN}]*{CONTRACTION_ANY_CASE}?",
        r"\p{N}{1,3}",
        SIGNS,
        LINE_ENDS,
        SPACES,
    )
)
JAIS2_SPACES = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Patterns that split the text one after another, each the parts that the one before left.

    With `ignores_merges` a part that is a token as a whole is not merged from its characters. `adds_bos` holds unless
    the file says otherwise. Without `is_byte_level` the vocabulary holds characters, with ▁ for spaces.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False
    is_byte_level: bool = True


DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
GEMMA4 = PreTokenizer((r"[^\n]+|[\n]+",), adds_bos=True, is_byte_level=False)
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", GPT2))
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", HAN_AND_KANA, DEEPSEEK3_WORDS))

_BY_NAMES: dict[str, PreTokenizer] = {
    "default": DEFAULT,
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code "
    "roberta-bpe mpt olmo jais trillion granite-docling exaone4": PreTokenizer((GPT2,)),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": _SINGLE_DIGITS,
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": PreTokenizer(
        (LLAMA3,), ignores_merges=True, adds_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": PreTokenizer((LLAMA3,)),
    "glm4 glm5": PreTokenizer((LLAMA3,), ignores_merges=True),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": PreTokenizer((QWEN2,)),
    "qwen35": PreTokenizer(
        (
            "|".join(
                (
                    CONTRACTION_ANY_CASE,
                    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                    r"\p{N}",
                    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
                    LINE_ENDS,
                    SPACES,
                )
            ),
        )
    ),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+\z",
            HAN_AND_HANGUL,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN_AND_HANGUL, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _DEEPSEEK3,
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            HAN_AND_KANA,
            "|".join((PUNCTUATED_WORD, r" ?[\p{P}\p{S}]+", r"[\r\n]", SPACES)),
            r"\p{N}",
        )
    ),
    "youtu": PreTokenizer(
        (
            "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
            "\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            GPT4O.replace(r"\p{N}{1,3}", r"\p{N}"),
        ),
        ignores_merges=True,
    ),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "poro-chat bloom gpt3-finnish": PreTokenizer((BLOOM,)),
    "viking": PreTokenizer((BLOOM, r"\p{N}")),
    "tekken": PreTokenizer((TEKKEN,), ignores_merges=True, adds_bos=True),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ),
        adds_bos=True,
    ),
    "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer((GPT4O,)),
    "granite-embed-multi-97m": PreTokenizer((GPT4O,), ignores_merges=True),
    "tiny_aya cohere2moe": PreTokenizer((DIGITS_FROM_THE_RIGHT, GPT4O)),
    "kimi-k2": PreTokenizer((KIMI,)),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer(
        (
            "|".join(
                (
                    "'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
                    WORD,
                    r"\p{N}",
                    SIGNS,
                    r"\s*[\r\n]",
                    SPACES,
                )
            ),
        )
    ),
    "seed-coder": PreTokenizer(
        ("|".join((CONTRACTION_ANY_CASE, WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", LINE_ENDS, SPACES)),)
    ),
    "ufakzeka": PreTokenizer(("|".join((WORD, r"\p{N}", SIGNS, LINE_ENDS, SPACES)),)),
    "afmoe": PreTokenizer(
        (
            DIGITS_FROM_THE_RIGHT,
            "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
            "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+",
            DEEPSEEK3_WORDS,
        )
    ),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", QWEN2)),
    "exaone-moe": PreTokenizer(
        (
            "|".join(
                (
                    CONTRACTION_ANY_CASE,
                    r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                    r"\p{N}",
                    r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                    r"\s*[\r\n]",
                    SPACES,
                )
            ),
        )
    ),
    "jais-2": PreTokenizer(
        ("|".join((CONTRACTION_ANY_CASE, WORD, r"\p{N}{1,3}", SIGNS, LINE_ENDS, JAIS2_SPACES, r"\s")),)
    ),
    "minicpm5": PreTokenizer(
        (r"\p{N}{1,3}", "|".join((CONTRACTION_ANY_CASE, WORD, r"\p{N}+", SIGNS, LINE_ENDS, SPACES))),
        ignores_merges=True,
    ),
    "gemma4 granite-embed-multi-311m": GEMMA4,
    "sarvam-moe": PreTokenizer(GEMMA4.patterns, is_byte_level=False),
}
PRE_TOKENIZERS = {name: one for names, one in _BY_NAMES.items() for name in names.split()}
