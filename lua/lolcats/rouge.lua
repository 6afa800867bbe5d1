-- rouge.lua: ROUGE-1, -2, -L and -Lsum by the rules of the rouge_score package (tokens are runs of a-z and 0-9; n-gram
-- overlap; longest common subsequence; its union over sentences), with or without its stemmer, and the summary of the
-- SCROLLS metric over them.
local M = {}

local TYPES = { "rouge1", "rouge2", "rougeL", "rougeLsum" }

--- The tokens of a text: lower case, everything but ASCII letters and digits is a gap. stem: words of more than three
--- letters by their stem.
function M.tokens(text, stem)
    -- two letters beyond ASCII whose lower case begins in it
    text = text:gsub("\226\132\170", "k"):gsub("\196\176", "i "):lower()
    local out = {}
    local porter = stem and require "lolcats.porter"
    for word in text:gmatch "[a-z0-9]+" do out[#out + 1] = porter and #word > 3 and porter.stem(word) or word end
    return out
end

local function score(hits, predicted, wanted)
    local p, r = hits / math.max(predicted, 1), hits / math.max(wanted, 1)
    return { precision = p, recall = r, fmeasure = p + r > 0 and 2 * p * r / (p + r) or 0 }
end

local function ngrams(tokens, n)
    local counts, total = {}, 0
    for i = 1, #tokens - n + 1 do
        local key = table.concat(tokens, " ", i, i + n - 1)
        counts[key] = (counts[key] or 0) + 1
        total = total + 1
    end
    return counts, total
end

local function rouge_n(target, prediction, n)
    local want, wanted = ngrams(target, n)
    local have, predicted = ngrams(prediction, n)
    local hits = 0
    for key, count in pairs(want) do hits = hits + math.min(count, have[key] or 0) end
    return score(hits, predicted, wanted)
end

-- Lengths of the longest common subsequence of all prefixes; row i, column j at [i * (#b + 1) + j].
local function lcs_table(a, b)
    local t, width = {}, #b + 1
    for j = 0, #b do t[j] = 0 end
    for i = 1, #a do
        local row, above = i * width, (i - 1) * width
        t[row] = 0
        for j = 1, #b do
            if a[i] == b[j] then
                t[row + j] = t[above + j - 1] + 1
            else
                t[row + j] = math.max(t[above + j], t[row + j - 1])
            end
        end
    end
    return t, width
end

local function rouge_l(target, prediction)
    if #target == 0 or #prediction == 0 then return score(0, 1, 1) end
    local t, width = lcs_table(target, prediction)
    return score(t[#target * width + #prediction], #prediction, #target)
end

-- Marks the places of `a` that its longest common subsequence with `b` uses.
local function mark_lcs(a, b, marked)
    local t, width = lcs_table(a, b)
    local i, j = #a, #b
    while i > 0 and j > 0 do
        if a[i] == b[j] then
            marked[i] = true
            i, j = i - 1, j - 1
        elseif t[i * width + j - 1] > t[(i - 1) * width + j] then
            j = j - 1
        else
            i = i - 1
        end
    end
end

local function count(sentences)
    local counts, total = {}, 0
    for _, s in ipairs(sentences) do
        for _, word in ipairs(s) do counts[word] = (counts[word] or 0) + 1 end
        total = total + #s
    end
    return counts, total
end

local function rouge_lsum(target, prediction, stem)
    local function sentences(text)
        local out = {}
        for line in text:gmatch "[^\n]+" do out[#out + 1] = M.tokens(line, stem) end
        return out
    end
    local want, have = sentences(target), sentences(prediction)
    local left, wanted = count(want)
    local there, predicted = count(have)
    if wanted == 0 or predicted == 0 then return score(0, 1, 1) end
    local hits = 0
    for _, s in ipairs(want) do
        local marked = {}
        for _, other in ipairs(have) do mark_lcs(s, other, marked) end
        for i, word in ipairs(s) do
            if marked[i] and (there[word] or 0) > 0 and left[word] > 0 then
                hits = hits + 1
                there[word], left[word] = there[word] - 1, left[word] - 1
            end
        end
    end
    return score(hits, predicted, wanted)
end

--- Scores of one prediction: rouge1, rouge2, rougeL and rougeLsum (lines count as sentences), each {precision, recall,
--- fmeasure}. opts: stem (words by their stem, as the package with use_stemmer).
function M.score(target, prediction, opts)
    local stem = opts and opts.stem
    local a, b = M.tokens(target, stem), M.tokens(prediction, stem)
    return { rouge1 = rouge_n(a, b, 1), rouge2 = rouge_n(a, b, 2), rougeL = rouge_l(a, b),
             rougeLsum = rouge_lsum(target, prediction, stem) }
end

local SHORT = {}
for word in ("mr mrs ms dr prof st vs etc jr sr inc ltd co corp no fig e.g i.e u.s a.m p.m"):gmatch "%S+" do
    SHORT[word] = true
end

--- A text with each sentence on a line of its own: it ends after . ! or ? (and what closes there) where white space and
--- then no small letter follows, but not after an initial or a common short form. Matters to rougeLsum alone.
function M.sentences(text)
    text = text:match "^%s*(.-)%s*$"
    local out, from = {}, 1
    for stop, after in text:gmatch "[.!?]+[\"')%]]*()%s+()" do
        local head = text:sub(from, stop - 1)
        local word = head:match "([%w.]+)%.[\"')%]]*$"
        local short = word and (SHORT[word:lower()] or word:match "^%u$")
        if not short and not text:sub(after, after):match "%l" then
            out[#out + 1] = head
            from = after
        end
    end
    if from <= #text then out[#out + 1] = text:sub(from) end
    return table.concat(out, "\n")
end

local function characters(s) return select(2, s:gsub("[^\128-\191]", "")) end
local function rounded(v) return math.floor(v * 1e4 + 0.5) / 1e4 end

--- The SCROLLS summary over predictions and references (each reference a text, or a list of which the best counts):
--- rouge/rouge1, rouge/rouge2, rouge/rougeL, rouge/rougeLsum and rouge/geometric_mean (of the first three) in percent,
--- num_predicted, mean_prediction_length_characters.
function M.summary(predictions, references)
    local sums, length, n = {}, 0, #predictions
    if n == 0 or n ~= #references then
        error(("rouge.summary: %d predictions and %d references"):format(n, #references), 2)
    end
    for i, text in ipairs(predictions) do
        local best = {}
        for _, reference in ipairs(type(references[i]) == "table" and references[i] or { references[i] }) do
            local s = M.score(M.sentences(reference), M.sentences(text))
            for _, k in ipairs(TYPES) do best[k] = math.max(best[k] or 0, s[k].fmeasure * 100) end
        end
        for _, k in ipairs(TYPES) do sums[k] = (sums[k] or 0) + best[k] / n end
        length = length + characters(text) / n
    end
    local out = { ["rouge/geometric_mean"] = rounded((sums.rouge1 * sums.rouge2 * sums.rougeL) ^ (1 / 3)),
                  num_predicted = n,
                  mean_prediction_length_characters = rounded(length) }
    for _, k in ipairs(TYPES) do out["rouge/" .. k] = rounded(sums[k]) end
    return out
end

return M
