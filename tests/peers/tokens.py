"""tokens.py FOLDER [SEED] [COUNT]: what the packages tokenizers, sentencepiece and tiktoken make of random texts, for
tokens.lua to compare with. The tokenizers are trained here on made-up text, in the forms that model families use; with
LOLCATS_TEST_DATA real ones are taken too. Each case file holds {path, style, parse, texts: [[text, ids, ids with
special tokens, their text, the same without special tokens]], ids: [[ids, text, text without special tokens]]}.
"""
import base64
import json
import os
import random
import sys
import unicodedata

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import sentencepiece as spm  # noqa: E402
import tiktoken  # noqa: E402
from sentencepiece import sentencepiece_model_pb2 as pb  # noqa: E402
from tokenizers import (AddedToken, Regex, Tokenizer, decoders as D, models, normalizers as N,  # noqa: E402
                        pre_tokenizers as P, processors, trainers)

FOLDER = os.path.abspath(sys.argv[1])
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 1
COUNT = int(sys.argv[3]) if len(sys.argv) > 3 else 600
R = random.Random(SEED)
os.makedirs(FOLDER, exist_ok=True)

# ---- texts -----------------------------------------------------------------------------------------------------------
# Only code points of Unicode 14, which Python 3.11 knows.
CHARS = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
BY_CATEGORY = {}
for c in CHARS:
    BY_CATEGORY.setdefault(unicodedata.category(c), []).append(c)
STARTS = [0x20, 0xA0, 0x300, 0x370, 0x400, 0x590, 0x600, 0x900, 0xE00, 0x1100, 0x1E00, 0x2000, 0x2100, 0x2460, 0x3000,
          0x3130, 0x3300, 0x4E00, 0xAC00, 0xF900, 0xFB00, 0xFE00, 0xFF00, 0x1D400, 0x1F100, 0x1F300, 0x1F600, 0x20000]
BLOCKS = [[chr(c) for c in range(s, s + 256) if unicodedata.category(chr(c)) not in ("Cn", "Cs")] for s in STARTS]
PARTS = ["\r\n", "\n\n", "\t", "\u200d", "\ufe0f", "e\u0301", "\u0308\u0301", "\U0001F469\u200d\U0001F4BB", "'s", "'LL",
         "1234567", "3.14", "\u00a0", "\u3000", "\u2581", "\u2581\u2581", "\ufeff", "\ufb01", "<s>", "</s>", "<unk>",
         "<mask>", "<|im_start|>", "<|end|>", "<0x0A>", "\x7f", "a_b", "CamelCase", "!!!", "\u2014", "\u0130",
         "\u00df", "\ufffd", "<sep>", "uds"]
WORDS = ("the of and once upon a time there was little girl def return import class na\u00efve \u00fcber "
         "\u043c\u0438\u0440 \u6771\u4eac \u65e5\u672c\u8a9e \uc548\ub155 \u0645\u0631\u062d\u0628\u0627 \u0936\u0928").split()


def text(special=()):
    kind, out, block = R.random(), [], R.choice(BLOCKS)
    for _ in range(R.choice([0, 1, 2, 3, 5, 8, 13, 21, 40, 80])):
        x = R.random()
        if kind < .25:
            out.append(R.choice(block))
        elif kind < .4:
            out.append(R.choice(CHARS))
        elif kind < .5:
            out.append(R.choice(BY_CATEGORY[R.choice(list(BY_CATEGORY))]))
        elif x < .35 or (kind < .7 and x < .5):
            out += [R.choice(WORDS), R.choice([" ", " ", "  ", "\n", ", ", ""])]
        elif x < .65:
            out.append(R.choice(PARTS))
        elif x < .8 and special:
            out.append(R.choice(special))
        else:
            out.append(" " * R.choice([1, 2, 3, 4, 7, 16, 17, 100]))
    return "".join(out).replace("\0", "")


def texts(special=()):
    big = "".join(text() + R.choice(["", " ", "\n"]) for _ in range(1200))
    return [text(special) for _ in range(COUNT)] + [big[:60000]]


def write(name, path, style, parse, rows, ids):
    with open(os.path.join(FOLDER, name + ".case.json"), "w") as f:
        json.dump(dict(path=path, style=style or "", parse=parse, texts=rows, ids=ids), f)


def some_ids(size):
    return [[R.randrange(size if i % 2 else min(300, size)) for _ in range(R.randrange(14))] for i in range(COUNT // 2)]


# ---- the three packages ----------------------------------------------------------------------------------------------
def with_tokenizers(name, path):
    t = Tokenizer.from_file(path)
    special = [a.content for a in t.get_added_tokens_decoder().values()][:40]
    rows = []
    for s in texts(special):
        ids = t.encode(s).ids
        rows.append([s, t.encode(s, add_special_tokens=False).ids, ids, t.decode(ids, skip_special_tokens=False),
                     t.decode(ids)])
    write(name, path, None, True, rows,
          [[i, t.decode(i, skip_special_tokens=False), t.decode(i)] for i in some_ids(t.get_vocab_size())])


def with_sentencepiece(name, path):
    t = spm.SentencePieceProcessor(model_file=path)
    bos = [t.bos_id()] if t.bos_id() >= 0 else []
    rows = []
    for s in texts():
        ids = t.encode(s)
        rows.append([s, ids, bos + ids, t.decode(bos + ids), t.decode(bos + ids)])
    write(name, path, "sentencepiece", False, rows, [[i, t.decode(i),
                                                      t.decode(i)] for i in some_ids(t.get_piece_size())])


def with_tiktoken(name, path):
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in open(path))}
    known = {2: "<|reserved_special_token_0|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>",
             0: "<|begin_of_text|>", 1: "<|end_of_text|>"}
    special = {s: len(ranks) + i for i, s in known.items()}
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
    t = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    rows = []
    for s in texts(list(special)):
        ids = t.encode(s, allowed_special="all")
        rows.append([s, ids, [len(ranks)] + ids, t.decode([len(ranks)] + ids),
                     t.decode([i for i in ids if i < len(ranks)])])
    write(name, path, None, True, rows, [[i, t.decode(i), t.decode(i)] for i in some_ids(len(ranks))])


# ---- tokenizers of every form ----------------------------------------------------------------------------------------
CORPUS = [" ".join(R.choice(WORDS) for _ in range(12)) for _ in range(3000)]
CORPUS += [s for s in (text().replace("\n", " ").replace("\r", " ") for _ in range(1000)) if s.strip()]
with open(os.path.join(FOLDER, "corpus.txt"), "w") as f:
    f.write("\n".join(CORPUS))


def sentencepiece_models():
    user = ["<sep>", "uds", "a_b", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "th", "the", " the", "<|im_start|>"]
    plain = dict(normalization_rule_name="identity", remove_extra_whitespaces=False)
    forms = {
        "bpe": dict(model_type="bpe"),
        "bpe_bytes": dict(model_type="bpe", byte_fallback=True, **plain),
        "bpe_user": dict(model_type="bpe", byte_fallback=True, user_defined_symbols=user, control_symbols=["<mask>"],
                         add_dummy_prefix=False, normalization_rule_name="nfkc", remove_extra_whitespaces=False),
        "bpe_suffix": dict(model_type="bpe", treat_whitespace_as_suffix=True),
        "unigram": dict(model_type="unigram"),
        "unigram_bytes": dict(model_type="unigram", byte_fallback=True, **plain),
        "unigram_user": dict(model_type="unigram", byte_fallback=True, user_defined_symbols=user,
                             normalization_rule_name="nmt_nfkc_cf"),
        "unigram_bare": dict(model_type="unigram", add_dummy_prefix=False, bos_id=-1, pad_id=3, unk_surface=" ?? "),
    }
    for name, form in forms.items():
        path = os.path.join(FOLDER, name)
        spm.SentencePieceTrainer.train(input=os.path.join(FOLDER, "corpus.txt"), model_prefix=path, vocab_size=7000,
                                       hard_vocab_limit=False, character_coverage=.985, minloglevel=2, num_threads=1,
                                       **form)
        yield name, path + ".model"
    # equal scores, pieces that are not to be used, and characters that are no pieces though pieces are made of them
    for name in ("bpe", "bpe_bytes", "bpe_user", "unigram", "unigram_bytes"):
        for kind in ("ties", "unused", "pruned"):
            m = pb.ModelProto()
            m.ParseFromString(open(os.path.join(FOLDER, name + ".model"), "rb").read())
            for i, p in enumerate(m.pieces):
                if p.type == 1 and kind == "pruned" and len(p.piece) == 1 and R.random() < .15:
                    p.piece = "\ue000%d" % i
                elif p.type == 1 and kind == "ties":
                    p.score = -R.randrange(1, 30) * .1
                elif p.type == 1 and kind == "unused" and len(p.piece) > 1 and R.random() < .25:
                    p.type = 5
            path = os.path.join(FOLDER, "%s_%s.model" % (name, kind))
            open(path, "wb").write(m.SerializeToString())
            yield "%s_%s" % (name, kind), path


def trained(norm, pre, dec, special=(), added=(), post=None, level=True, **options):
    t = Tokenizer(models.BPE(**options))
    if norm:
        t.normalizer = norm
    if pre:
        t.pre_tokenizer = pre
    t.decoder = dec
    special = list(special) + (["<0x%02X>" % i for i in range(256)] if options.get("byte_fallback") else [])
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=2500, special_tokens=special, show_progress=False, limit_alphabet=1000,
        initial_alphabet=P.ByteLevel.alphabet() if level else []))
    j = json.loads(t.to_str())
    j["added_tokens"] = [a for a in j["added_tokens"] if not a["content"].startswith("<0x")]
    t = Tokenizer.from_str(json.dumps(j))
    for a in added:
        (t.add_special_tokens if a.special else t.add_tokens)([a])
    if post:
        first = [(s, t.token_to_id(s)) for s in special[:1]]
        t.post_processor = processors.TemplateProcessing(single=post, special_tokens=first)
    return t


def cut(regex):
    return P.Sequence([P.Split(Regex(regex), "isolated"), P.ByteLevel(add_prefix_space=False, use_regex=False)])


def hugging_face_files():
    case = r"\p{M}\p{Lm}\p{Lo}]"
    qwen = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+")
    tekken = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}" + case + r"*[\p{Ll}" + case + r"+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    A, chat = AddedToken, [AddedToken("<|im_start|>", special=True), AddedToken("<tool>", special=False,
                                                                                normalized=False)]
    spm_back = [D.Replace("\u2581", " "), D.ByteFallback(), D.Fuse()]
    spm_like = dict(level=False, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    yield "qwen", trained(N.NFC(), cut(qwen), D.ByteLevel(), added=chat)
    yield "tekken", trained(None, cut(tekken), D.ByteLevel(), ["<s>", "</s>"], post="<s> $A", ignore_merges=True)
    yield "smollm", trained(None, P.Sequence([P.Digits(True), P.ByteLevel(add_prefix_space=False)]), D.ByteLevel(),
                            added=chat)
    yield "phi", trained(None, P.ByteLevel(add_prefix_space=False), D.ByteLevel(),
                         added=[A(" " * k, normalized=True) for k in range(31, 1, -1)] + [A("\t\t", normalized=True)])
    yield "phi3", trained(N.Sequence([N.Prepend("\u2581"), N.Replace(" ", "\u2581")]), None,
                          D.Sequence(spm_back + [D.Strip(" ", 1, 0)]), ["<s>", "<unk>"], post="<s> $A",
                          added=[A("</s>", rstrip=True), A("<|end|>", rstrip=True, special=True), A("uds",
                                                                                                    single_word=True),
                                 A("<mask>", lstrip=True, rstrip=True, single_word=True, special=True)], **spm_like)
    yield "gemma", trained(N.Replace(" ", "\u2581"), P.Split(" ", "merged_with_previous"), D.Sequence(spm_back),
                           ["<bos>", "<unk>"], post="<bos> $A",
                           added=[A("\n\n", normalized=False), A("<|im_start|>", special=True)], **spm_like)
    yield "metaspace", trained(None, P.Metaspace("\u2581", "first", False), D.Metaspace("\u2581", "first"), ["<unk>"],
                               added=[A("<mask>", special=True)], **spm_like)
    yield "words", trained(N.Sequence([N.NFKD(), N.StripAccents(), N.Strip(), N.Lowercase()]),
                           P.Sequence([P.WhitespaceSplit(), P.Punctuation()]), D.BPEDecoder("</w>"), ["[UNK]"],
                           level=False,
                           unk_token="[UNK]", end_of_word_suffix="</w>")
    for name in ("unigram", "unigram_bytes", "unigram_user"):
        m = pb.ModelProto()
        m.ParseFromString(open(os.path.join(FOLDER, name + ".model"), "rb").read())
        t = Tokenizer(models.Unigram([(p.piece, p.score) for p in m.pieces], 0, byte_fallback="bytes" in name))
        steps = [N.Nmt(), N.NFKC()] if "bytes" in name else [N.Precompiled(m.normalizer_spec.precompiled_charsmap)]
        t.normalizer = N.Sequence(steps + [N.Strip(left=False, right=True), N.Replace(Regex(" {2,}"), "\u2581")])
        t.pre_tokenizer, t.decoder = P.Metaspace("\u2581", "always"), D.Metaspace("\u2581", "always")
        t.add_special_tokens([A("</s>", special=True), A("<mask>", special=True, lstrip=True)])
        t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        yield "hf_" + name, t


for name, path in sentencepiece_models():
    with_sentencepiece("spm_" + name, path)
for name, t in hugging_face_files():
    path = os.path.join(FOLDER, name + ".tokenizer.json")
    t.save(path)
    with_tokenizers(name, path)
data = os.environ.get("LOLCATS_TEST_DATA")
if data:
    folder = os.path.join(os.path.abspath(data), "assets", "tokenizers")
    for name in ("smollm2", "llama3-hf", "mistral-v1-hf"):
        with_tokenizers(name, os.path.join(folder, name, "tokenizer.json"))
    with_sentencepiece("llama2", os.path.join(folder, "llama2", "tokenizer.model"))
    with_tiktoken("llama3", os.path.join(folder, "llama3", "tokenizer.model"))
