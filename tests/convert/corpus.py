"""A generated corpus on which two tokenizers must agree: words of several scripts, code, and whatever breaks a BPE."""

import random

WORDS = {
    "english": (
        "the of and to in is was he for it with as his on be at by I've you'll WE'RE don't they'd o'clock "
        'Tokenisation behaves differently at boundaries; punctuation, e.g. (this), "that" -- or \u2014 matters: '
        "naïve café résumé Ångström ﬁnal ſtraße İstanbul U.S.A. e-mail@example.org https://example.org/a?b=c&d=1#e"
    ).split(),
    "code": [
        "def f(x):\n    return x**2\n",
        "for (int i = 0; i < n; ++i) {\n\ta[i] ^= 0xFF;\n}\n",
        "if __name__ == '__main__':\n        main()\r\n",
        "SELECT * FROM t WHERE a >= 1.5e-3 AND b != 'x''y';\n",
        '{"key": [1, 2.50, null, true], "s": "\\u00e9\\n"}',
        '<div class="a b">&nbsp;</div>\n\n\n',
        "#include <vector>\n// ----------------------------\n",
        "let x = &mut y?.z::<T>()!;\n\t\t\t",
        "$ make -j2 && ./a.out | tee /dev/null 2>&1\n",
    ],
    "chinese": list("天地玄黄宇宙洪荒日月盈昃辰宿列张你好世界人工智能模型推理速度很快，。！？「」（）：；、"),
    "japanese": ["これは", "トークン", "化の", "試験", "です", "。", "ｶﾀｶﾅ", "々", "ー", "が", "か\u3099", "、", "ﾞ"],
    "korean": ["안녕하세요", "세계", "모델은", "빠르다", ".", "ㄱㄴㄷ", "\u1112\u1161\u11ab", "한글"],
    "arabic": ["السلام", "عليكم", "النموذج", "سريع", "،", "؟", "١٢٣", "لا", "إِنَّ", "ﷺ", "\u200fمرحبا\u200e"],
    "hindi": ["नमस्ते", "दुनिया", "मॉडल", "तेज़", "है", "।", "१२३", "क्ष", "ज्ञ", "श्री"],
    "others": [
        "Привет",
        "мир",
        "Γειά",
        "σου",
        "κόσμε",
        "שלום",
        "עולם",
        "สวัสดี",
        "ชาวโลก",
        "Tiếng",
        "Việt",
        "ქართული",
        "አማርኛ",
    ],
    "emoji": ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷🇩🇪", "❤️", "☎︎", "1️⃣", "🧑🏿‍🚀", "🫠", "✨", "🇺", "\ufe0f", "\u200d"],
    "digits": [
        "0",
        "7",
        "12",
        "123",
        "1234",
        "12345678901234567890",
        "3.14159",
        "1,000,000",
        "½",
        "²",
        "Ⅷ",
        "٣",
        "1e10",
    ],
    "control": [
        "\x00",
        "\x01",
        "\x07",
        "\x08",
        "\x0b",
        "\x0c",
        "\x1b[0m",
        "\x1c",
        "\x7f",
        "\x85",
        "\u2028",
        "\ufeff",
        "\ufffd",
    ],
    "special": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|python_tag|>",
        "<|image|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_246|>",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id",
        "|eot_id|>",
        "<|EOT_ID|>",
        "<|<|eot_id|>|>",
        "< |eot_id|>",
    ],
    "runs": [
        "aaaaaaaa",
        "========",
        "--------",
        "........",
        "!?!?!?",
        "abababab",
        "\u3000\u3000",
        "\u00a0\u00a0",
        "_____",
    ],
}
SPACES = [
    " ",
    " ",
    " ",
    " ",
    "",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    " \n ",
    "\r\n",
    "\u00a0",
    "\u2003",
    "    ",
    "\n\n\n\n",
]


def texts(num_characters: int, seed: int = 0) -> list[str]:
    """Texts of altogether at least `num_characters`: half of them of one kind of word, half of all kinds mixed."""
    rng = random.Random(seed)
    kinds = list(WORDS)
    result: list[str] = []
    total = 0
    while total < num_characters:
        chosen = [kinds[len(result) // 2 % len(kinds)]] if len(result) % 2 else kinds
        pieces = []
        for _ in range(rng.randint(1, 120)):
            word = rng.choice(WORDS[rng.choice(chosen)])
            space = rng.choice(SPACES)
            pieces += [word * rng.choice((1, 1, 1, 2, 9)), space * rng.choice((1, 1, 1, 1, 5, 40))]
        result.append("".join(pieces))
        total += len(result[-1])
    return result


def random_characters(count: int, seed: int = 0) -> str:
    """Code points drawn evenly from the whole of Unicode, surrogates left out."""
    rng = random.Random(seed)
    points = (rng.randrange(0x110000 - 0x800) for _ in range(count))
    return "".join(chr(point if point < 0xD800 else point + 0x800) for point in points)
