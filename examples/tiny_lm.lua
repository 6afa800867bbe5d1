-- tiny_lm.lua: a small language model written out by hand and trained from nothing, letter by letter, in seconds.
--   lolcats tiny_lm                     on sentences made up here
--   lolcats tiny_lm --text book.txt --steps 2000
local lc = require "lolcats"
local data = require "lolcats.data"

local args = lc.args {
    "Train a small transformer on the letters of a text.",
    { "text", "", "a text file; without one, made-up sentences" },
    { "steps", 300, "updates", min = 1 },
    { "layers", 2, "blocks", min = 1 },
    { "dim", 64, "width; a multiple of the heads", min = 8 },
    { "heads", 4, "attention heads", min = 1 },
    { "seq", 64, "letters a row", min = 8 },
    { "lr", 3e-3, "learning rate" },
    { "seed", 1, "start of the weights and order of rows" },
    { "out", "runs/tiny_lm", "folder for checkpoints, logs and plots" },
    { "fresh", false, "start over instead of going on" },
    { "quiet", false, "print the sample alone" },
}

local function made_up_sentences()
    local who = { "the cat", "a dog", "my aunt", "the red bird", "an old man", "the moon" }
    local does = { "sees", "likes", "follows", "paints", "hides", "remembers" }
    local what = { "the ball", "a blue house", "the sea", "some tea", "every star", "the garden" }
    local lines, n = {}, 7
    local function pick(list)
        n = (n * 1103515245 + 12345) % 2147483648
        return list[1 + math.floor(n / 65536) % #list]
    end
    for i = 1, 800 do lines[i] = pick(who) .. " " .. pick(does) .. " " .. pick(what) .. "." end
    return table.concat(lines, "\n")
end

-- Letters are the tokens.
local text = args.text ~= "" and lc.files.read(args.text) or made_up_sentences()
local letters, id_of = {}, {}
local ids = {}
for i = 1, #text do
    local c = text:sub(i, i)
    if not id_of[c] then
        letters[#letters + 1] = c
        id_of[c] = #letters - 1
    end
    ids[i] = id_of[c]
end
local rows = data.from_ids(ids, { seq = args.seq, hold_out = 0.05, vocabulary = #letters, name = "letters" })

-- The model: embedding, blocks of attention and a gated MLP, and the embedding once more as the output matrix.
lc.manual_seed(args.seed)
local params = {}
local function param(name, x)
    params[#params + 1] = { name = name, tensor = lc.param(x) }
    return x
end
local D, H, V = args.dim, args.heads, #letters
local embed = param("embed", lc.randn(V, D) * 0.1)
local blocks = {}
for i = 1, args.layers do
    local function matrix(name, out, inp) return param(("block.%d.%s"):format(i, name), lc.randn(out, inp) * inp ^ -0.5) end
    blocks[i] = { norm1 = param(("block.%d.norm1"):format(i), lc.ones(D)), norm2 = param(("block.%d.norm2"):format(i), lc.ones(D)),
                  qkv = matrix("qkv", 3 * D, D), out = matrix("out", D, D), gate = matrix("gate", 2 * D, D), up = matrix("up", 2 * D, D),
                  down = matrix("down", D, 2 * D) }
end
local last_norm = param("norm", lc.ones(D))
local inv_freq = {}
for i = 0, D / H / 2 - 1 do inv_freq[i + 1] = 10000 ^ (-2 * i / (D / H)) end
inv_freq = lc.keep(lc.tensor(inv_freq))

local function logits(batch) -- ids [b, t] -> [b, t, V]
    local b, t = batch:size(1), batch:size(2)
    local cos, sin = lc.rope_table(lc.arange(t, { dtype = "i32" }), inv_freq)
    local x = lc.embedding(embed, batch)
    for _, w in ipairs(blocks) do
        local n = lc.rms_norm(x, w.norm1)
        local parts = lc.linear(n, w.qkv):reshape(b, t, 3, H, D / H):permute(3, 1, 4, 2, 5)
        local q, k, v = lc.rope(parts[1], cos, sin), lc.rope(parts[2], cos, sin), parts[3]
        local y = lc.attention(q, k, v):permute(1, 3, 2, 4):reshape(b, t, D)
        x = x + lc.linear(y, w.out)
        n = lc.rms_norm(x, w.norm2)
        x = x + lc.linear(lc.swiglu(lc.linear(n, w.gate), lc.linear(n, w.up)), w.down)
    end
    return lc.linear(lc.rms_norm(x, last_norm), embed)
end

local function loss(batch) -- each letter predicts the next
    local all = logits(batch.ids):slice(2, 1, -2):reshape(-1, V)
    return (lc.cross_entropy(all, batch.ids:slice(2, 2, -1):reshape(-1)))
end

local run = lc.run {
    name = "train", out = args.out, data = rows, batch = 8, params = params, optim = lc.adamw { lr = args.lr, weight_decay = 0.01 },
    schedule = lc.cosine { warmup = 20 }, max_steps = args.steps, clip = 1, seed = args.seed, eval_every = 100, quiet = args.quiet,
    eval = function()
        local total, held = 0, rows.held:list(16)
        for _, row in ipairs(held) do total = total + loss(row):item() / #held end
        return total
    end,
}
for batch in run:steps() do
    run:backward(loss(batch))
end

-- A sample, each letter drawn from the model's odds.
local out = { id_of["\n"] or 0 }
for _ = 1, 200 do
    local recent = { unpack(out, math.max(1, #out - args.seq + 1)) }
    out[#out + 1] = lc.no_grad(lc.scope, function()
        local odds = (logits(lc.tensor({ recent }, { dtype = "i32" })):select(2, -1):reshape(-1) * 1.5):softmax(-1):cumsum(-1)
        local r = lc.rand(1):item() * 0.999999
        return math.min(V - 1, odds:lt(lc.full({ 1 }, r)):to("f32"):sum():item())
    end)
end
local said = {}
for i = 2, #out do said[i - 1] = letters[out[i] + 1] end
print(table.concat(said))
