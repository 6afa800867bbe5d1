-- models/rope.lua: rotary frequencies by their scalings, as Hugging Face defines them: default, linear, dynamic (NTK),
-- yarn, longrope and llama3. Other kinds are refused by name.
local lc = require "lolcats"

local M = {}

M.KINDS = { "default", "linear", "dynamic", "yarn", "longrope", "llama3" }

local function list_of(s, key, half, where)
    local v = s[key]
    if type(v) ~= "table" or #v ~= half then
        lc.fail("%s: rope_scaling of type 'longrope' needs %d numbers as '%s', it has %s", where, half, key,
                type(v) == "table" and tostring(#v) or tostring(v))
    end
    for _, x in ipairs(v) do
        if type(x) ~= "number" or x <= 0 then
            lc.fail("%s: rope_scaling: '%s' holds %s; numbers above 0 are wanted", where, key, tostring(x))
        end
    end
    return v
end

-- The scaling of a config in the keys it needs, or nil for none. c: hidden sizes and lengths are settled already;
-- original: the config's own original_max_position_embeddings, which goes before the scaling's.
local function check(s, c, original, where)
    local kind = s.rope_type or s.type or "default"
    local out = { rope_type = kind }
    local function number(key, default)
        local v = s[key]
        if v == nil then v = default end
        if v == nil or type(v) ~= "number" or v <= 0 then
            lc.fail("%s: rope_scaling of type '%s' needs a number above 0 as '%s', it is %s", where, kind, key,
                    tostring(s[key]))
        end
        out[key] = v
        return v
    end
    local function optional(key)
        if s[key] ~= nil then number(key) end
    end
    local function trained_length()
        out.original_max_position_embeddings = original
        if not original then number("original_max_position_embeddings", c.max_position_embeddings) end
        return out.original_max_position_embeddings
    end
    if kind == "default" then return nil
    elseif kind == "linear" or kind == "dynamic" then number "factor"
    elseif kind == "llama3" then
        number "factor"; number "low_freq_factor"; number "high_freq_factor"; trained_length()
    elseif kind == "yarn" or kind == "longrope" then
        number("factor", c.max_position_embeddings / trained_length())
        optional "attention_factor"
        if kind == "yarn" then
            optional "beta_fast"; optional "beta_slow"; optional "mscale"; optional "mscale_all_dim"
            out.truncate = s.truncate
        else
            out.short_factor = list_of(s, "short_factor", c.head_dim / 2, where)
            out.long_factor = list_of(s, "long_factor", c.head_dim / 2, where)
        end
    else
        lc.fail("%s: rope_scaling of type '%s' is not supported; %s are", where, tostring(kind),
                table.concat(M.KINDS, ", "))
    end
    return out
end

--- Base and scaling of a config (Hugging Face's keys, old and new) into out.rope_theta and out.rope_scaling. out has
--- head_dim and max_position_embeddings already.
function M.settle(out, c, where)
    local s = c.rope_scaling or c.rope_parameters or {}
    if type(s) ~= "table" then lc.fail("%s: rope_scaling must be an object, it is %s", where, tostring(s)) end
    for _, key in ipairs { "full_attention", "sliding_attention" } do
        if s[key] ~= nil then lc.fail("%s: rope_parameters of their own for '%s' are not supported", where, key) end
    end
    local theta = s.rope_theta or c.rope_theta or 10000
    if type(theta) ~= "number" or theta <= 0 then
        lc.fail("%s: 'rope_theta' must be a number above 0, it is %s", where, tostring(theta))
    end
    local part = s.partial_rotary_factor or c.partial_rotary_factor or 1
    if part ~= 1 then lc.fail("%s: partial_rotary_factor = %s is not supported; 1 is", where, tostring(part)) end
    out.rope_theta, out.rope_scaling = theta, check(s, out, c.original_max_position_embeddings, where)
end

-- ---- the kinds ------------------------------------------------------------------------------------------------------
local function llama3(v, s)
    local ctx, wavelength = s.original_max_position_embeddings, 2 * math.pi / v
    if wavelength > ctx / s.low_freq_factor then return v / s.factor end
    if wavelength < ctx / s.high_freq_factor then return v end
    local part = (ctx / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - part) * v / s.factor + part * v
end

local function yarn_magnitude(factor, mscale)
    return factor <= 1 and 1 or 0.1 * mscale * math.log(factor) + 1
end

-- Share of interpolation by pair 0 .. d/2 - 1, and the factor of cos and sin.
local function yarn(s, theta, d)
    local function pair_of(rotations)
        return d * math.log(s.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
    end
    local low, high = pair_of(s.beta_fast or 32), pair_of(s.beta_slow or 1)
    if s.truncate ~= false then low, high = math.floor(low), math.ceil(high) end
    low, high = math.max(low, 0), math.min(high, d - 1)
    if low == high then high = high + 0.001 end
    local scale = s.attention_factor
    if not scale and s.mscale and s.mscale_all_dim then
        scale = yarn_magnitude(s.factor, s.mscale) / yarn_magnitude(s.factor, s.mscale_all_dim)
    end
    return function(i) return math.min(math.max((i - low) / (high - low), 0), 1) end,
           scale or yarn_magnitude(s.factor, 1)
end

local function longrope_magnitude(s)
    if s.attention_factor then return s.attention_factor end
    return s.factor <= 1 and 1 or math.sqrt(1 + math.log(s.factor) / math.log(s.original_max_position_embeddings))
end

--- Do the frequencies depend on how long the text is?
function M.varies(c)
    local s = c.rope_scaling
    return s ~= nil and (s.rope_type == "dynamic" or s.rope_type == "longrope")
end

--- Inverse frequencies of a config: a table of head_dim / 2 numbers, and the factor of cos and sin. length: positions
--- that the text reaches (those kinds that vary look at it).
function M.inv_freq(c, length)
    local d, s, out = c.head_dim, c.rope_scaling or { rope_type = "default" }, {}
    local theta, kind, scale, ramp = c.rope_theta, s.rope_type, 1, nil
    if kind == "dynamic" then
        local n, most = math.max(length or 0, c.max_position_embeddings), c.max_position_embeddings
        theta = theta * (s.factor * n / most - (s.factor - 1)) ^ (d / (d - 2))
    elseif kind == "yarn" then
        ramp, scale = yarn(s, theta, d)
    elseif kind == "longrope" then
        scale = longrope_magnitude(s)
    end
    local factors = (length or 0) > (s.original_max_position_embeddings or 0) and s.long_factor or s.short_factor
    for i = 0, d / 2 - 1 do
        local v = theta ^ (-2 * i / d)
        if kind == "linear" then v = v / s.factor
        elseif kind == "llama3" then v = llama3(v, s)
        elseif kind == "yarn" then v = v / s.factor * ramp(i) + v * (1 - ramp(i))
        elseif kind == "longrope" then v = v / factors[i + 1] end
        out[i + 1] = v
    end
    return out, scale
end

--- Rounds a table of frequencies to float32 and then to bfloat16, nearest even: what the reference computes with as
--- soon as LoRA is attached.
function M.round_bf16(list)
    return lc.scope(function()
        return lc.tensor(list, { dtype = "f32", device = "cpu" }):to("bf16"):to("f32"):totable()
    end)
end

--- The scaling that a GGUF's own divisors stand for: Llama 3.1's where they are those, else the divisors themselves in
--- the shape that says the same to other programs.
function M.from_factors(c, factors)
    if #factors ~= c.head_dim / 2 then
        lc.fail("rope_freqs.weight holds %d factors, a head has %d pairs", #factors, c.head_dim / 2)
    end
    local most = 0
    for _, f in ipairs(factors) do most = math.max(most, f) end
    local guess = { rope_type = "llama3", factor = most, low_freq_factor = 1, high_freq_factor = 4,
                    original_max_position_embeddings = 8192 }
    local same = most > 1
    for i = 0, #factors - 1 do
        local v = c.rope_theta ^ (-2 * i / c.head_dim)
        same = same and math.abs(v / llama3(v, guess) / factors[i + 1] - 1) < 1e-5
    end
    if same then return guess end
    return { rope_type = "longrope", factor = 1, attention_factor = 1, short_factor = factors, long_factor = factors,
             original_max_position_embeddings = c.max_position_embeddings }
end

return M
