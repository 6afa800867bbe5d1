-- porter.lua: Porter's stemmer for English with the extensions of NLTK, which the rouge_score package uses when asked to
-- stem: "stem" of a word in small ASCII letters. Steps and names are the paper's (M. Porter, An algorithm for suffix
-- stripping, 1980).
local M = {}

local IRREGULAR = { skies = "sky", sky = "sky", dying = "die", lying = "lie", tying = "tie", news = "news",
                    innings = "inning", inning = "inning", outings = "outing", outing = "outing", cannings = "canning",
                    canning = "canning", howe = "howe", proceed = "proceed", exceed = "exceed", succeed = "succeed" }

-- The word as c (consonant) and v (vowel): y is a vowel after a consonant.
local function form(w)
    local out, before = {}, nil
    for i = 1, #w do
        local c = w:sub(i, i)
        local vowel = c:match "[aeiou]" or (c == "y" and before == "c")
        before = vowel and "v" or "c"
        out[i] = before
    end
    return table.concat(out)
end

local function measure(w) return select(2, form(w):gsub("v+c+", "")) end
local function positive(w) return measure(w) > 0 end
local function long(w) return measure(w) > 1 end
local function has_vowel(w) return form(w):find("v", 1, true) ~= nil end
local function double(w) return #w >= 2 and w:sub(-1) == w:sub(-2, -2) and form(w):sub(-1) == "c" end
local function cvc(w)
    local f = form(w)
    return f:match "cvc$" ~= nil and not w:match "[wxy]$" or f == "vc"
end

-- The first rule whose suffix fits decides: {suffix, instead, condition on what is left}.
local function apply(w, rules)
    for _, rule in ipairs(rules) do
        local suffix = rule[1]
        if w:sub(-#suffix) == suffix or suffix == "" then
            local stem = w:sub(1, #w - #suffix)
            return (not rule[3] or rule[3](stem)) and stem .. rule[2] or w
        end
    end
    return w
end

local function rules_of(text, condition)
    local out = {}
    for suffix, instead in text:gmatch "(%a+)>(%a*)" do out[#out + 1] = { suffix, instead, condition } end
    return out
end

local STEP1A = rules_of "sses>ss ies>i ss>ss s>"
local STEP2 = rules_of([[ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble alli>al entli>ent eli>e ousli>ous
    ization>ize ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous aliti>al iviti>ive biliti>ble
    fulli>ful]], positive)
STEP2[#STEP2 + 1] = { "logi", "log", function(stem) return positive(stem .. "l") end }
local STEP3 = rules_of("icate>ic ative> alize>al iciti>ic ical>ic ful> ness>", positive)
local STEP4 = rules_of("al> ance> ence> er> ic> able> ible> ant> ement> ment> ent>", long)
STEP4[#STEP4 + 1] = { "ion", "", function(stem) return long(stem) and stem:match "[st]$" ~= nil end }
for _, rule in ipairs(rules_of("ou> ism> ate> iti> ous> ive> ize>", long)) do STEP4[#STEP4 + 1] = rule end

local function step1b(w)
    if w:match "ied$" then return w:sub(1, -4) .. (#w == 4 and "ie" or "i") end
    if w:match "eed$" then return positive(w:sub(1, -4)) and w:sub(1, -2) or w end
    local stem
    for _, suffix in ipairs { "ed", "ing" } do
        if w:sub(-#suffix) == suffix and has_vowel(w:sub(1, -#suffix - 1)) then
            stem = w:sub(1, -#suffix - 1)
            break
        end
    end
    if not stem then return w end
    if stem:match "at$" or stem:match "bl$" or stem:match "iz$" then return stem .. "e" end
    if double(stem) then return stem:match "[lsz]$" and stem or stem:sub(1, -2) end
    return measure(stem) == 1 and cvc(stem) and stem .. "e" or stem
end

local function step2(w)
    if w:match "alli$" and positive(w:sub(1, -5)) then return step2(w:sub(1, -5) .. "al") end
    return apply(w, STEP2)
end

local function step5(w)
    if w:match "e$" then
        local stem = w:sub(1, -2)
        local m = measure(stem)
        if m > 1 or (m == 1 and not cvc(stem)) then w = stem end
    end
    return w:match "ll$" and long(w:sub(1, -2)) and w:sub(1, -2) or w
end

--- The stem of a word of small letters and digits.
function M.stem(w)
    if IRREGULAR[w] then return IRREGULAR[w] end
    if #w <= 2 then return w end
    w = w:match "^.ies$" and w:sub(1, -2) or apply(w, STEP1A)
    w = step1b(w)
    if w:match "y$" and #w > 2 and form(w:sub(1, -2)):match "c$" then w = w:sub(1, -2) .. "i" end
    w = apply(apply(step2(w), STEP3), STEP4)
    return step5(w)
end

return M
