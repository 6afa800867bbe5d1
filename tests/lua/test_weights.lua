-- test_weights.lua: files of tensors in every format that is written and read: PyTorch's (zip, legacy,
-- distributed), GGUF, shards; conversion between them; what is refused and by which words; saves that are
-- interrupted.
local t = dofile(((arg and arg[0] or ""):match("^(.*/)") or "") .. "harness.lua")
local lc = require "lolcats"
local files = require "lolcats.files"
local convert = require "lolcats.convert"

local here = (arg and arg[0] or ""):match("^(.*/)") or ""
local folder = os.tmpname()
os.remove(folder)
files.make_dirs(folder)
local function path(name) return folder .. "/" .. name end

local function clear(dir)
  for _, name in ipairs(files.list(dir)) do
    if files.is_dir(dir .. "/" .. name) then clear(dir .. "/" .. name) else files.remove(dir .. "/" .. name) end
  end
  files.remove(dir)
end

local function sample()
  return {
    ["a.weight"] = lc.randn(3, 4), ["a.bias"] = lc.randn(4):to "bf16", h = lc.randn(2, 2, 2):to "f16",
        d = lc.randn(3, {dtype = "f64"}),
    i = lc.arange(5, {dtype = "i64"}), j = lc.arange(3, {dtype = "i32"}), u = lc.arange(4, {dtype = "i32"}):to "u8",
    scalar = lc.tensor(2.5), empty = lc.zeros(0, 3),
  }
end

local function same_tensors(f, want)
  local names = f:names()
  table.sort(names)
  local mine = {}
  for name in pairs(want) do mine[#mine + 1] = name end
  table.sort(mine)
  t.eq(names, mine)
  for name, x in pairs(want) do
    local y = f:tensor(name)
    t.eq(y.dtype, x.dtype, name)
    t.eq(y.shape, x.shape, name)
    if x:numel() > 0 then t.close(y:double(), x:double(), 0) end
  end
end

---- PyTorch ---------------------------------------------------------------------------------------------------------
t.test("a .pt is written and read", function()
  local want = sample()
  files.save_tensors(path "m.pt", want)
  local f = files.open_tensors(path "m.pt")
  t.eq(f.format, "torch")
  same_tensors(f, want)
  t.eq(f:info("a.bias").file_dtype, "bfloat16")
  t.eq(f:info("a.weight").offset % 64, 0) -- aligned as torch.save aligns
  t.eq(next(f:meta()), nil)
  f:close()
end)

t.test("a view with strides is written as what it shows", function()
  local x = lc.arange(12):reshape(3, 4)
  files.save_tensors(path "v.pt", {t = x:t(), n = x:narrow(2, 2, 2)})
  local f = files.open_tensors(path "v.pt")
  t.close(f:tensor "t", x:t():contiguous(), 0)
  t.close(f:tensor "n", x:narrow(2, 2, 2):contiguous(), 0)
  f:close()
end)

t.test("plain values stand beside the tensors, under a wrapper", function()
  files.save_tensors(path "w.pt", {x = lc.ones(2)}, nil,
                     {wrap = "model_state_dict", values = {step = 7, big = 2 ^ 40, loss = 0.25, one = {real = 1},
                         name = "é", on = true, off = false, none = files.null}})
  local f = files.open_tensors(path "w.pt")
  t.eq(f:names(), {"x"})
  local m = f:meta()
  t.eq({m.step, m.big, m.loss, m.one, m.name, m.on, m.off, m.none == files.null}, {7, 2 ^ 40, 0.25, 1, "é", true,
      false, true})
  t.eq(f:meta "step", 7)
  f:close()
  t.errors(function() files.save_tensors(path "w.pt", {x = lc.ones(2)}, nil, {values = {a = {}}}) end,
      "the value 'a' is a table")
end)

t.test("safetensors to .pt and back is the same file", function()
  for _, meta in ipairs {{format = "pt"}, {}, {format = "pt", about = 'x"\\\n'}} do
    files.save_tensors(path "s.safetensors", sample(), meta)
    convert.convert(path "s.safetensors", path "s.pt")
    convert.convert(path "s.pt", path "back.safetensors")
    t.ok(files.read(path "s.safetensors") == files.read(path "back.safetensors"), files.to_json(meta))
  end
end)

-- Of the fuzzers' inputs, which torch wrote.
local function corpus(name) return files.read(here .. "../c/corpus/" .. name) end

t.test("what torch wrote: strides, parameters, old and new form", function()
  files.write(path "zip.pt", corpus "fuzz_torch/zip":sub(2))
  files.write(path "legacy.pt", corpus "fuzz_torch/legacy":sub(2))
  for _, name in ipairs {"zip.pt", "legacy.pt"} do
    local f = files.open_tensors(path(name))
    t.eq(f:names(), {"a", "b", "c", "d"})
    t.eq(f:tensor("a"):totable(), {{0, 1, 2}, {3, 4, 5}})
    t.eq(f:tensor("b"):totable(), {{0, 3}, {1, 4}, {2, 5}})
    t.eq(f:tensor("b", {dtype = "f64"}):totable(), {{0, 3}, {1, 4}, {2, 5}})
    t.eq(f:tensor("d").dtype, "bf16")
    local m = f:meta()
    t.eq({m.step, m.loss, m.n, m.l[1], m.l[2][1], m.l[3].k}, {3, 0.5, 2 ^ 70, 1, 2, true})
    f:close()
  end
end)

t.test("a distributed checkpoint", function()
  local bytes = corpus "fuzz_parts/one"
  local n = bytes:byte(1) + bytes:byte(2) * 256
  files.make_dirs(path "dcp")
  files.write(path "dcp/.metadata", bytes:sub(3, 2 + n))
  files.write(path "dcp/__0_0.distcp", bytes:sub(3 + n))
  local f = files.open_tensors(path "dcp")
  t.eq(f:names(), {"w", "v"})
  t.eq(f:tensor("w"):totable(), {{0, 1, 2}, {3, 4, 5}})
  t.eq(f:meta "step", 5)
  f:close()
  convert.convert(path "dcp", path "dcp.safetensors")
  f = files.open_tensors(path "dcp.safetensors")
  t.eq(f:tensor("w"):totable(), {{0, 1, 2}, {3, 4, 5}})
  f:close()
  files.write(path "dcp/__0_0.distcp", bytes:sub(3 + n, -100))
  t.errors(function() files.open_tensors(path "dcp") end, "__0_0.distcp")
  files.remove(path "dcp/__0_0.distcp")
  t.errors(function() files.open_tensors(path "dcp") end, "__0_0.distcp.*No such file")
  files.write(path "dcp/.metadata", (bytes:sub(3, 2 + n):gsub("__0_0%.distcp", "../x/y.distc")))
  t.errors(function() files.open_tensors(path "dcp") end, "does not lie in the folder")
end)

---- what is refused -------------------------------------------------------------------------------------------------
local HEAD = "\128\2\138\10l\252\156\70\249 j\168P\25.\128\2M\233\3.\128\2}X\13\0\0\0little_endian\136s."
local EMPTY_LIST = "\128\2]."

local function refused(pickle, words)
  files.write(path "bad.pt", HEAD .. pickle .. EMPTY_LIST)
  t.errors(function() files.open_tensors(path "bad.pt") end, words)
end

t.test("a pickle that asks for more is refused by what it asks for", function()
  refused("\128\2cos\nsystem\nX\4\0\0\0echo\133R.", "byte 2 of the pickle: it asks for os%.system")
  refused("\128\4\140\8builtins\140\4eval\147\140\1x\133R.", "builtins%.eval")
  refused("\128\2}X\1\0\0\0acposix\nsystem\nX\1\0\0\0x\133Rs.", "posix%.system")
  refused("\128\2ctorch\nload\nX\1\0\0\0x\133R.", "torch%.load")
  refused("\128\2ctorch._utils\n_rebuild_qtensor\n)R.", "_rebuild_qtensor")
  refused("\128\2(iposix\nsystem\n.", "posix%.system")
  -- only where distributed checkpoints have it
  refused("\128\2cpathlib\nPosixPath\nX\1\0\0\0/\133R.", "pathlib%.PosixPath")
  refused("\128\2ctorch._utils\n_rebuild_tensor_v2\n)R.", "does not take")
  refused("\128\2ctorch.nn.parameter\nParameter\n)\129.", "does not take")
end)

t.test("pickles that lie about sizes, nest too deep or hold themselves", function()
  refused("\128\2X\255\255\255\127abc.", "needs 2147483647 bytes")
  refused("\128\2]r\255\255\255\255.", "the memo has no index 4294967295")
  refused("\128\2h\5.", "the memo has nothing at 5")
  refused("\128\2" .. ("("):rep(2000) .. ".", "nests too deep")
  refused("\128\2" .. ("]"):rep(1000) .. ("a"):rep(999) .. ".", "nest deeper")
  refused("\128\2]q\0h\0a.", "nest") -- a list in itself
  refused("\128\2]q\0" .. ("(h\0h\0e"):rep(3) .. ".", "nest") -- and many times
  refused("\128\2s.", "too few values")
  refused("\128\2N(s.", "too few values")
  refused("\128\2]K\1", "without its last opcode")
  refused("\128\2\255.", "opcode 0xff")
  refused("\128\9N.", "protocol above 5")
  refused("\128\2Q.", "too few values")
  refused("\128\2K\1Q.", "persistent id")
  refused("\128\2}(X\1\0\0\0aK\1X\1\0\0\0aK\2u.", "'a' occurs twice")
end)

-- A tensor over a storage of n floats, in a legacy file.
local function tensor_pickle(n, offset, size, stride)
  local function num(v) return "J" .. string.char(v % 256, math.floor(v / 256) % 256, math.floor(v / 65536) % 256,
      math.floor(v / 2 ^ 24) % 256) end
  local function tuple(list)
    local out = {}
    for i, v in ipairs(list) do out[i] = num(v) end
    return "(" .. table.concat(out) .. "t"
  end
  return "\128\2}X\1\0\0\0xctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" ..
      "0X\3\0\0\0cpu" .. num(n) ..
    "tQ" .. num(offset) .. tuple(size) .. tuple(stride) .. "\137ccollections\nOrderedDict\n)RtRs."
end
local function legacy_tensor(n, offset, size, stride, data)
  files.write(path "t.pt", HEAD .. tensor_pickle(n, offset, size, stride) .. "\128\2]X\1\0\0\0" .. "0a." .. (data or
      (string.char(n) .. ("\0"):rep(7) .. ("\0\0\128\63"):rep(n))))
  return files.open_tensors(path "t.pt")
end

t.test("tensors that reach beyond their storage", function()
  local f = legacy_tensor(6, 0, {2, 3}, {3, 1})
  t.eq(f:tensor("x"):totable(), {{1, 1, 1}, {1, 1, 1}})
  f:close()
  f = legacy_tensor(6, 1, {4}, {1})
  t.eq(#f:tensor("x"):totable(), 4)
  f:close()
  t.errors(function() legacy_tensor(6, 0, {2, 4}, {4, 1}) end,
      "tensor 'x': it reaches to element 7 of a storage of 6")
  t.errors(function() legacy_tensor(6, 3, {4}, {1}) end, "reaches to element 6")
  t.errors(function() legacy_tensor(6, 0, {2147483647, 2147483647}, {2147483647, 2147483647}) end, "too large")
  t.errors(function() legacy_tensor(6, 0, {65536, 65536}, {0, 0}) end, "repeats a storage of 24 bytes")
  t.errors(function() legacy_tensor(6, 0, {2, 3}, {1}) end, "2 dims but 1 strides")
  t.errors(function() legacy_tensor(6, 0, {2, -3}, {3, 1}) end, "no whole number")
  t.errors(function() legacy_tensor(6, -1, {2}, {1}) end, "offset")
  t.errors(function() legacy_tensor(6, 0, {2}, {1}, "\6" .. ("\0"):rep(7) .. "abc") end,
      "needs 32 bytes; the file ends after 11")
  t.errors(function() legacy_tensor(6, 0, {2}, {1}, "\7" .. ("\0"):rep(7) .. ("\0"):rep(24)) end, "has 7 elements")
  t.errors(function() legacy_tensor(6, 0, {2}, {1}, "\6" .. ("\0"):rep(7) .. ("\0"):rep(25)) end,
      "1 bytes follow the last storage")
end)

t.test("archives that are cut, compressed, or leave their folder", function()
  files.save_tensors(path "z.pt", {x = lc.ones(4), y = lc.ones(3)})
  local good = files.read(path "z.pt")
  local function broken(text, words)
    files.write(path "z2.pt", text)
    t.errors(function() files.open_tensors(path "z2.pt") end, words)
  end
  for _, n in ipairs {4, 100, #good - 1, #good - 30} do broken(good:sub(1, n), "z2.pt: .*") end
  broken(good:sub(1, -30), "central directory")
  broken(good:gsub("z/data/1", "../ata/1"), "leaves the archive's folder")
  broken(good:gsub("z/data/1", "z/data/0"), "occurs twice")
  broken(good:gsub("z/data/1", "z/data/7"), "the storage data/1 is missing")
  broken(good:gsub("z/data%.pkl", "z/dat_.pkl"), "without data.pkl")
  broken(good:gsub("FloatStorage", "LongStorage_"), "LongStorage_")
  broken(good:gsub("little", "xittle"), "byte order")
  local at = good:find("PK\1\2", 1, true) -- the first entry's method
  broken(good:sub(1, at + 9) .. "\8\0" .. good:sub(at + 12), "is compressed")
  broken(good:sub(1, at + 7) .. "\9\8" .. good:sub(at + 10), "is encrypted")
  local pickle = good:find("X\1\0\0\0x", 1, true)
  broken(good:sub(1, pickle + 4) .. "q" .. good:sub(pickle + 6), "checksum")
end)

---- GGUF ------------------------------------------------------------------------------------------------------------
t.test("GGUF is written and read, with metadata", function()
  local want = {w = lc.randn(4, 64), n = lc.randn(5), h = lc.randn(2, 3):to "f16", i = lc.arange(3, {dtype = "i32"})}
  files.save_tensors(path "g.gguf", want, nil, {values = {["general.architecture"] = "llama", ["x.count"] = 7,
      ["x.neg"] = -3, ["x.eps"] = 1e-5,
    ["x.on"] = true, ["x.big"] = {"u64", 2 ^ 40}, ["x.words"] = {array = {"a", "bc"}}, ["x.ids"] = {array = {1, 2,
        3}, type = "i32"}}})
  local f = files.open_tensors(path "g.gguf")
  t.eq(f.format, "gguf")
  same_tensors(f, want)
  t.eq(f:meta "general.architecture", "llama")
  t.eq({f:meta "x.count", f:meta "x.neg", f:meta "x.on", f:meta "x.big"}, {7, -3, true, 2 ^ 40})
  t.close(f:meta "x.eps", 1e-5, 1e-9)
  t.eq({f:meta "x.words", f:meta "x.ids"}, {{"a", "bc"}, {1, 2, 3}})
  f:close()
  convert.convert(path "g.gguf", path "g2.gguf")
  t.ok(files.read(path "g.gguf") == files.read(path "g2.gguf"))
end)

t.test("GGUF of halves to safetensors and back is the same", function()
  files.save_tensors(path "h.gguf", {a = lc.randn(3, 4):to "f16", b = lc.randn(7):to "f16"})
  convert.convert(path "h.gguf", path "h.safetensors")
  local f, g = files.open_tensors(path "h.gguf"), files.open_tensors(path "h.safetensors")
  for _, name in ipairs {"a", "b"} do
    t.eq(g:tensor(name).dtype, "f16")
    t.eq(files.sha256(f:tensor(name):contiguous()), files.sha256(g:tensor(name):contiguous()))
  end
  f:close()
  g:close()
  convert.convert(path "h.safetensors", path "h2.gguf")
  t.ok(files.read(path "h.gguf") == files.read(path "h2.gguf"))
end)

t.test("quantising", function()
  local x = lc.randn(8, 64)
  files.save_tensors(path "q.safetensors", {w = x, norm = lc.randn(64):to "bf16", odd = lc.randn(4, 33)})
  for dtype, error in pairs {q8_0 = 0.02, q5_1 = 0.12, q5_0 = 0.16, q4_1 = 0.25, q4_0 = 0.3} do
    convert.convert(path "q.safetensors", path "q.gguf", {dtype = dtype})
    local f = files.open_tensors(path "q.gguf")
    t.eq(f:info("w").dtype, dtype)
    t.eq({f:info("norm").dtype, f:info("odd").dtype}, {"f32", "f16"})
    t.ok((f:tensor("w", {dtype = "f32"}) - x):abs():amax():item() < error * 4, dtype)
    f:close()
    convert.convert(path "q.gguf", path "q.pt") -- blocks become halves
    f = files.open_tensors(path "q.pt")
    t.eq(f:info("w").dtype, "f16")
    f:close()
  end
  t.errors(function() convert.convert(path "q.safetensors", path "q.pt", {dtype = "q8_0"}) end, "only held by .gguf")
end)

t.test("GGUF of version 1 counts in 32 bits", function()
  local function n(v, bytes)
    local out = {}
    for i = 1, bytes do out[i], v = string.char(v % 256), math.floor(v / 256) end
    return table.concat(out)
  end
  local function s(text) return n(#text, 4) .. text end
  local head = "GGUF" .. n(1, 4) .. n(1, 4) .. n(3, 4) .. s "general.architecture" .. n(8,
      4) .. s "llama" .. s "k" .. n(4, 4) .. n(9, 4) ..
    s "words" .. n(9, 4) .. n(8, 4) .. n(2, 4) .. s "x" .. s "yz" .. s "t" .. n(2, 4) .. n(2, 4) .. n(3, 4) .. n(0,
        4) .. n(0, 8)
  head = head .. ("\0"):rep(-#head % 32)
  files.write(path "v1.gguf", head .. ("\0\0\128\63"):rep(6))
  local f = files.open_tensors(path "v1.gguf")
  t.eq(f:tensor("t"):totable(), {{1, 1}, {1, 1}, {1, 1}})
  t.eq({f:meta "k", f:meta "words", f:meta "general.architecture"}, {9, {"x", "yz"}, "llama"})
  f:close()
  convert.convert(path "v1.gguf", path "v3.gguf")
  f = files.open_tensors(path "v3.gguf")
  t.eq({f:meta "k", f:meta "words"}, {9, {"x", "yz"}})
  f:close()
  t.errors(function() files.write(path "v4.gguf", "GGUF" .. n(4,
      4) .. ("\0"):rep(64)) files.open_tensors(path "v4.gguf") end, "version 4")
end)

---- shards ----------------------------------------------------------------------------------------------------------
t.test("a large model is written in shards, and old ones go", function()
  local want = {}
  for i = 1, 6 do want["w" .. i] = lc.randn(10, 10) end
  t.eq(files.save_sharded(path "sh", want, {max_shard = 1000}), 3)
  t.eq(files.list(path "sh"), {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
      "model-00003-of-00003.safetensors",
                               "model.safetensors.index.json"})
  local f = files.open_tensors(path "sh")
  same_tensors(f, want)
  t.eq(f:meta "format", "pt")
  f:close()
  t.eq(files.read_json(path "sh/model.safetensors.index.json").metadata.total_size, 2400)
  f = files.open_tensors(path "sh/model.safetensors.index.json")
  t.eq(#f:names(), 6)
  f:close()
  t.eq(select(2, convert.convert(path "sh", path "sh2", {max_shard = 500})), 6)
  convert.convert(path "sh2", path "sh.pt")
  f = files.open_tensors(path "sh.pt")
  same_tensors(f, want)
  f:close()
  t.eq(files.save_sharded(path "sh", want), 1)
  t.eq(files.list(path "sh"), {"model.safetensors"})
  t.eq(files.save_sharded(path "sh3", want, {max_shard = 1000, format = "torch"}), 3)
  f = files.open_tensors(path "sh3")
  same_tensors(f, want)
  f:close()
end)

t.test("conversion takes other dtypes", function()
  local x = lc.randn(40, 50)
  files.save_tensors(path "c.safetensors", {x = x, i = lc.arange(3, {dtype = "i64"})})
  convert.convert(path "c.safetensors", path "c.pt", {dtype = "bf16"})
  local f = files.open_tensors(path "c.pt")
  t.eq({f:info("x").dtype, f:info("i").dtype}, {"bf16", "i64"})
  t.close(f:tensor("x", {dtype = "f32"}), x:to("bf16"):float(), 0)
  f:close()
  t.errors(function() convert.convert(path "c.safetensors", path "c.xyz") end, "its ending is not one")
  t.errors(function() convert.convert(path "c.safetensors", path "d.pt", {dtype = "f12"}) end, "dtype 'f12'")
  t.ok(not files.exists(path "d.pt"))
end)

t.test("all tensors of a file at once", function()
  local all = files.load_tensors(path "c.safetensors", {dtype = "f32"})
  t.eq({all.x.dtype, all.i:totable()}, {"f32", {0, 1, 2}})
  all = files.load_tensors(path "c.pt")
  t.eq({all.x.dtype, all.i.dtype}, {"bf16", "i64"})
end)

t.test("inspect", function()
  local about = convert.inspect(path "w.pt")
  t.eq({about.format, about.count, about.bytes, about.metadata.step}, {"torch", 1, 8, 7})
  t.eq(about.tensors[1].name .. about.tensors[1].dtype, "xfloat32")
  t.ok(files.parse_json(files.to_json(convert.inspect(path "g.gguf"))).count == 4)
end)

t.test("a broken-off save of shards leaves the old model", function()
  local old, new = {}, {}
  for i = 1, 4 do old["w" .. i], new["w" .. i] = lc.ones(100), lc.zeros(100) end
  files.save_sharded(path "br", old, {max_shard = 500})
  new.w4 = nil
  local list = {{name = "w1", tensor = new.w1}, {name = "w2", tensor = new.w2}, {name = "w3", tensor = new.w3},
      {name = "", tensor = new.w1}}
  t.errors(function() files.save_sharded(path "br", list, {max_shard = 500}) end, "name")
  local f = files.open_tensors(path "br")
  for i = 1, 4 do t.eq(f:tensor("w" .. i):sum():item(), 100) end
  f:close()
  files.save_sharded(path "br", old, {max_shard = 500}) -- what was left behind is no hindrance
  t.eq(#files.list(path "br"), 5)
end)

local program = os.getenv "LOLCATS_PROGRAM"
if program then
  t.test("the recipes from the command line", function()
    local function run(command)
      local pipe = io.popen(program .. " " .. command .. " 2>&1")
      local out = pipe:read "*a"
      pipe:close()
      return out
    end
    files.save_tensors(path "r.safetensors", {x = lc.ones(2, 3)})
    t.ok(run("convert " .. path "r.safetensors" .. " " .. path "r.pt"):find "1 tensors")
    t.ok(run("inspect " .. path "r.pt"):find "float32%s+%[2, 3%]%s+24 bytes")
    t.eq(files.parse_json(run("inspect --json " .. path "r.pt")).tensors[1].shape, {2, 3})
    files.write(path "bad.pt", HEAD .. "\128\2cos\nsystem\nX\4\0\0\0echo\133R." .. EMPTY_LIST)
    t.ok(run("inspect " .. path "bad.pt"):find "os%.system")
  end)
end

-- A safetensors file of n bf16 values, all holes.
local function sparse(name, n)
  local head = ('{"x":{"dtype":"BF16","shape":[%d],"data_offsets":[0,%d]}}'):format(n, 2 * n)
  head = head .. (" "):rep(-#head % 8)
  files.write(path(name), string.char(#head) .. ("\0"):rep(7) .. head)
  return os.execute(("truncate -s %d %s"):format(8 + #head + 2 * n, path(name))) == 0
end

t.test("a file of 2 GB is mapped, not read", function()
  if not sparse("big.safetensors", 1e9) then return end
  local t0, before = lc.now(), lc.peak_rss()
  local f = files.open_tensors(path "big.safetensors")
  local x = f:tensor "x"
  t.eq(x:numel(), 1e9)
  t.ok(lc.now() - t0 < 0.05, ("%.0f ms"):format((lc.now() - t0) * 1e3))
  t.ok(lc.peak_rss() - before < 4e6, "memory was taken")
  f:close()
end)

if program and not os.getenv "LOLCATS_EXACT_MEMORY" then -- sanitizers take memory of their own
  t.test("what is converted takes its own size", function() -- in a process of its own: a peak is for ever
    if not sparse("peak.safetensors", 5e7) then return end
    local code = [[local x = lc.files.open_tensors("%s"):tensor("x", {dtype = "f32"}) print(lc.peak_rss())]]
    code = code:format(path "peak.safetensors")
    local pipe = io.popen(("%s -e '%s'"):format(program, code))
    local peak = tonumber(pipe:read "*l")
    pipe:close()
    t.ok(peak < 2.35e8, ("%.0f MB"):format(peak / 1e6)) -- 200 MB of f32, a few pieces of the file, the program
    code = [[require("lolcats.convert").convert("%s", "%s", {dtype = "f32"}) print(lc.peak_rss())]]
    local command = ("%s -e '%s'"):format(program, code:format(path "peak.safetensors", path "peak.pt"))
    pipe = io.popen(command)
    peak = tonumber(pipe:read "*l")
    pipe:close()
    t.ok(peak < 8e7, ("converting a file: %.0f MB"):format(peak / 1e6))
  end)
end

t.test("what cannot be saved leaves the old file", function()
  files.save_tensors(path "keep.pt", {x = lc.ones(2)})
  local before = files.read(path "keep.pt")
  t.errors(function() files.save_tensors(path "keep.pt", {{name = "a", tensor = lc.ones(2)}, {name = "a",
      tensor = lc.ones(3)}}) end, "two tensors")
  t.errors(function() files.save_tensors(path "keep.pt", {a = 3}) end, "'a' is a number")
  t.ok(files.read(path "keep.pt") == before)
  t.ok(not files.exists(path "keep.pt.tmp"))
end)

clear(folder)
t.finish()
