-- The shared counters of one environment. One script in four parts: cells, requests, limits, sessions. A call of the
-- script runs one command, atomically.
--
-- A cell is the state of one quota. The node computes everything that a response tells a caller (waits, headers,
-- which quotas are short) from the cell states that the script returns. All numbers are integers below 2^53, which
-- doubles represent exactly. The level of a rolling quota consists of whole tokens and a fraction in units of
-- 1/period token. The script never multiplies two large numbers.
--
-- A piece is a part of a reservation: { reserved amounts, amounts of these already spent, names of cells, turn of
-- each cell }. A turn identifies a period of a calendar quota; it is 0 for a rolling quota. A reservation has several
-- pieces if it was extended in a later period.
--
-- KEYS: the cells; the sessions and sums; the reservations of this session. They share a hash tag and therefore a
-- slot. So do the keys of other sessions, which are derived from the third key. The command reserve_at has three more:
-- those of the upstream, whose counters are stored like those of an environment.
-- ARGV: command, now (0: use the server's clock), deadline (0: none; after the deadline the command does nothing),
-- session, bounds of calendar periods, arguments of the command.

local cells_key, meta_key, reservations_key = KEYS[1], KEYS[2], KEYS[3]
local floor, max, min = math.floor, math.max, math.min

-- The first number of every reply.
local DENIED, ADMITTED, TOO_MANY_IN_FLIGHT, STALE_PERIOD, UNKNOWN_SESSION, DEADLINE_PASSED, DONE = 0, 1, 2, 3, 4, 5, 6
local TOTAL, PROMPT, COMPLETION, REQUESTS = 1, 2, 3, 4
local MAX_AMOUNT = 2 ^ 40
-- A clamped completion has at least this many tokens.
local MIN_CLAMPED_COMPLETION = 16
-- A session without a heartbeat for this long has ended, and its reservations are charged.
local SESSION_TIMEOUT_MS = 15000
-- If no node sent a heartbeat for this long, the server was unavailable, and all sessions are renewed.
local OUTAGE_MS = 5000
-- Arguments of one call of a Redis command. unpack() cannot return more than about 8,000 values. The number is even
-- because fields are written together with their values.
local MAX_ARGUMENTS = 1000
-- Reservations charged by one command, approximately.
local MAX_CHARGED = 200
-- Time that nodes get to restore their state on a server that has lost its data. Until then no node admits requests.
local RESTORE_MS = 1000
-- A node that comes later than this after the cells were created again no longer restores what only it knew.
local LATE_RESTORE_MS = 60000
-- The field of a session's reservations that holds its lease. No request has this id.
local LEASE = 'lease'
-- For this long after the end of a session the script remembers which reservations it charged.
local RETENTION_MS = 86400000
-- A week of the clock begins on Monday. The first one after the Unix epoch begins here.
local WEEK_MS, FIRST_MONDAY_MS = 604800000, 345600000
-- Interval for recording that a cell is in use, and for removing cells that are not.
local SEEN_INTERVAL_MS = 3600000

local last_read = 0
local function read_text() last_read = last_read + 1 return ARGV[last_read] end
local function read_int() last_read = last_read + 1 return tonumber(ARGV[last_read]) end
local function read_amounts() return { read_int(), read_int(), read_int(), read_int() } end
local function read_texts(n) local all = {} for i = 1, n do all[i] = read_text() end return all end

local command, now, deadline, session = read_text(), read_int(), read_int(), read_text()
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + floor(time[2] / 1000)
end
if deadline > 0 and now > deadline then return { DEADLINE_PASSED, now } end
local period_bounds = {}
for _ = 1, read_int() do
  local class, start = read_text(), read_int()
  period_bounds[class] = { start, read_int() }
end

-- The key of a session's reservations, and the key of those that were charged after its end.
local reservations_prefix = reservations_key:sub(1, #reservations_key - #session)
local function reservations_key_of(other) return reservations_prefix .. other end
local function charged_key_of(other) return reservations_prefix .. 'charged:' .. other end

local function is_session_open()
  return (tonumber(redis.call('HGET', meta_key, 's:' .. session)) or 0) > 0
end

-- A cell that no node uses is removed after two of its periods and a day.
local function cell_retention_ms(cell) return 2 * (cell.per or cell.stop - cell.start) + RETENTION_MS end

-- The cells that this call uses, by name. `false`: the cell does not exist. Each is read once and written once.
local cells, is_changed = {}, {}
-- The names of the cells of an upstream, which are in `upstream_cells_key`.
local is_of_upstream, upstream_cells_key = {}, KEYS[4]

local function load_cells(names, key)
  local missing = {}
  for _, name in ipairs(names) do
    if cells[name] == nil then missing[#missing + 1] = name cells[name] = false end
  end
  if #missing == 0 then return end
  for from = 1, #missing, MAX_ARGUMENTS do
    local part = { unpack(missing, from, min(from + MAX_ARGUMENTS - 1, #missing)) }
    for i, packed in ipairs(redis.call('HMGET', key or cells_key, unpack(part))) do
      if packed then cells[part[i]] = cmsgpack.unpack(packed) end
    end
  end
end

local function save_fields(key, fields)
  for from = 1, #fields, MAX_ARGUMENTS do
    redis.call('HSET', key, unpack(fields, from, min(from + MAX_ARGUMENTS - 1, #fields)))
  end
end

local function save_cells()
  local own, of_upstream = {}, {}
  for name in pairs(is_changed) do
    local fields = is_of_upstream[name] and of_upstream or own
    fields[#fields + 1] = name
    fields[#fields + 1] = cmsgpack.pack(cells[name])
  end
  save_fields(cells_key, own)
  save_fields(upstream_cells_key, of_upstream)
end

-- The limit 0 is unlimited. Such a quota counts the amounts settled in its period: a calendar cell in `used`, a rolling cell
-- in `clock`, which counts since `since`. Its bucket refills by the last limit.

-- Begins the clock's next period of a rolling cell if the current one has ended. If the clock was stepped back, the
-- amount stays.
local function roll_clock(cell)
  local offset = cell.per == WEEK_MS and FIRST_MONDAY_MS or 0
  local start = floor((now - offset) / cell.per) * cell.per + offset
  if not cell.since or start > cell.since then cell.clock = 0 end
  cell.since = start
end

-- Adds a settled amount. A negative one corrects an earlier one.
local function count(cell, amount) cell.clock = max(cell.clock + amount, 0) end

-- Limits the level to the part of the burst that is not held.
local function cap_level(cell)
  local top = cell.burst - cell.held
  if cell.whole >= top then cell.whole, cell.fraction = top, 0 end
end

-- Adds limit * elapsed / per tokens, exactly.
local function refill(cell)
  roll_clock(cell)
  local elapsed = now - cell.at
  cell.at = now
  local missing = cell.burst - cell.held - cell.whole
  if missing <= 0 or elapsed <= 0 then return end
  local per, limit = cell.per, cell.limit == 0 and (cell.last or 0) or cell.limit
  local periods = floor(elapsed / per)
  -- A product too large to be exact is also larger than any `missing`.
  if periods * limit >= missing then
    cell.whole, cell.fraction = cell.whole + missing, 0
    return
  end
  local rest = elapsed - periods * per
  local tokens_per_ms = floor(limit / per)
  local odd = limit - tokens_per_ms * per
  -- odd * rest / per by long division: both factors are below 2^35, and a limb has 12 bits.
  local quotient, remainder = 0, 0
  for _, limb in ipairs({ floor(rest / 16777216), floor(rest / 4096) % 4096, rest % 4096 }) do
    local part = remainder * 4096 + odd * limb
    local whole = floor(part / per)
    quotient = quotient * 4096 + whole
    remainder = part - whole * per
  end
  cell.whole = cell.whole + periods * limit + tokens_per_ms * rest + quotient
  cell.fraction = cell.fraction + remainder
  if cell.fraction >= per then
    cell.whole, cell.fraction = cell.whole + 1, cell.fraction - per
  end
  cap_level(cell)
end

-- Starts the next period if the current one has ended. If the clock was stepped back, the used and held amounts do
-- not change. If the node sent no bounds for this cell, because it does not have the quota, the period does not
-- change. Returns false if the bounds that the node sent are stale.
local function roll_period(cell)
  if now >= cell.start and now < cell.stop then return true end
  local period = period_bounds[cell.class]
  if not period then return true end
  if now < period[1] or now >= period[2] then return false end
  if now >= cell.stop then
    cell.turn, cell.used, cell.held = max(cell.turn + 1, period[1]), 0, 0
  end
  cell.start, cell.stop = period[1], period[2]
  return true
end

-- Advances cells to the current time. A command that only reads the cells need not save them. Returns false if the
-- bounds of a calendar period are stale.
local function advance_to_now(names)
  for _, name in ipairs(names) do
    local cell = cells[name]
    if cell then
      if cell.class then
        if not roll_period(cell) then return false end
      else
        refill(cell)
      end
    end
  end
  return true
end

local function fits(cell, amount)
  if cell.limit == 0 then return true end
  local needed = max(amount, 1)
  if cell.class then return amount <= cell.limit and cell.used + cell.held + needed <= cell.limit end
  return amount <= cell.burst and cell.whole >= needed
end

local function all_fit(names, amounts, generates)
  for _, name in ipairs(names) do
    local cell = cells[name]
    local is_required = generates or cell.kind ~= COMPLETION
    if is_required and not fits(cell, amounts[cell.kind]) then return false end
  end
  return true
end

-- Holds amounts in cells and returns the piece that records this.
local function hold_amounts(names, amounts)
  local turns = {}
  for i, name in ipairs(names) do
    local cell = cells[name]
    turns[i] = 0
    if cell then
      local amount = amounts[cell.kind]
      cell.held = cell.held + amount
      if cell.class then turns[i] = cell.turn else cell.whole = cell.whole - amount end
      is_changed[name] = true
    end
  end
  return { amounts, { 0, 0, 0, 0 }, names, turns }
end

-- Applies f to the amounts of each kind.
local function map_kinds(f, ...)
  local result = {}
  for i = 1, 4 do
    local values = {}
    for j = 1, select('#', ...) do values[j] = select(j, ...)[i] end
    result[i] = f(unpack(values))
  end
  return result
end
local function subtract(a, b) return map_kinds(function(x, y) return max(x - y, 0) end, a, b) end
local function minimum(a, b) return map_kinds(min, a, b) end

-- Moves amounts that are certainly spent from held to used. `spent`: everything that the reservation has spent so
-- far. `moved`: the amounts that earlier calls have moved.
local function progress(pieces, spent)
  for _, piece in ipairs(pieces) do
    local reserved, moved, names, turns = piece[1], piece[2], piece[3], piece[4]
    local more = subtract(minimum(spent, reserved), moved)
    for k = 1, 4 do moved[k] = moved[k] + more[k] end
    local is_any = more[1] + more[2] + more[3] + more[4] > 0
    for i, name in ipairs(is_any and names or {}) do
      local cell = cells[name]
      if cell then
        is_changed[name] = true
        local amount = more[cell.kind]
        if not cell.class or cell.turn == turns[i] then
          cell.held = max(cell.held - amount, 0)
          if cell.class then cell.used = cell.used + amount else count(cell, amount) end
        end
      end
    end
    spent = subtract(spent, reserved)
  end
end

local function settle_piece(piece, spent)
  local reserved, moved, names, turns = piece[1], piece[2], piece[3], piece[4]
  for i, name in ipairs(names) do
    local cell = cells[name]
    if cell then
      local r, m, s = reserved[cell.kind], moved[cell.kind], spent[cell.kind]
      local held = max(r - m, 0)
      if not cell.class then
        cell.held = max(cell.held - held, 0)
        cell.whole = cell.whole + held - (s - m)
        cap_level(cell)
        count(cell, s - m)
      elseif cell.turn == turns[i] then
        cell.held = max(cell.held - held, 0)
        cell.used = max(cell.used + s - m, 0)
      else
        -- The period of the piece is over. Only the amount above the reservation is charged, in the current period.
        cell.used = cell.used + max(s - r, 0)
      end
      is_changed[name] = true
    end
  end
end

-- Charges each piece up to its reserved amounts. Charges the rest to the last piece.
local function settle(pieces, spent)
  for i, piece in ipairs(pieces) do
    local part = i == #pieces and spent or minimum(spent, piece[1])
    spent = subtract(spent, part)
    settle_piece(piece, part)
  end
end

-- Enlarges a reservation, whether the amounts fit or not.
local function extend(pieces, more)
  local piece, last = hold_amounts(pieces[1][3], more), pieces[#pieces]
  local is_same_turn = #last[4] == #piece[4]
  for i, turn in ipairs(piece[4]) do is_same_turn = is_same_turn and last[4][i] == turn end
  if not is_same_turn then
    pieces[#pieces + 1] = piece
    return
  end
  for k = 1, 4 do last[1][k] = last[1][k] + more[k] end
end

-- The names of all cells in which these reservations hold something.
local function cell_names(reservations)
  local names, seen = {}, {}
  for _, pieces in pairs(reservations) do
    for _, piece in ipairs(pieces) do
      for _, name in ipairs(piece[3]) do
        if not seen[name] then seen[name] = true names[#names + 1] = name end
      end
    end
  end
  return names
end

-- Appends the state of a cell to a reply: nine numbers.
local function append_state(reply, name)
  local cell = cells[name]
  local state = cell.class and { cell.limit, cell.limit, cell.used, 0, cell.held, cell.start, cell.stop, cell.turn }
    or cell.limit == 0 and { 0, 0, cell.clock, 0, cell.held, cell.since, cell.since + cell.per, cell.since }
    or { cell.limit, cell.burst, cell.whole, cell.fraction, cell.held, cell.at, 0, 0 }
  for _, value in ipairs(state) do reply[#reply + 1] = value end
  reply[#reply + 1] = cell.override
end

local function all_exist(names)
  for _, name in ipairs(names) do if not cells[name] then return false end end
  return true
end

-- Lowers the completion tokens to the amount that all quotas have left after the prompt, in equal parts for the
-- completions. Returns nil if the result is below the minimum or does not fit.
local function clamp(names, amounts, completions)
  local room = math.huge
  for _, name in ipairs(names) do
    local cell = cells[name]
    local left = max(cell.class and cell.limit - cell.used - cell.held or cell.whole, 0)
    if cell.limit == 0 then left = math.huge end
    if cell.kind == TOTAL then room = min(room, max(left - amounts[PROMPT], 0)) end
    if cell.kind == COMPLETION then room = min(room, left) end
  end
  local one = floor(room / completions)
  local completion = min(one * completions, MAX_AMOUNT)
  if one < MIN_CLAMPED_COMPLETION or completion >= amounts[COMPLETION] then return nil end
  local total = min(amounts[PROMPT] + completion, MAX_AMOUNT)
  local lowered = { total, amounts[PROMPT], completion, amounts[REQUESTS] }
  return all_fit(names, lowered, true) and lowered or nil
end

-- The largest used amount that a cell takes over when its quota changes.
local function max_carried(cell) return cell.class and cell.limit or cell.burst end

-- Limits the used amount of a cell. Debt beyond it is forgiven.
local function limit_used(cell, used)
  if cell.class then
    cell.used = min(cell.used, used)
  elseif cell.whole < cell.burst - cell.held - used then
    cell.whole, cell.fraction = cell.burst - cell.held - used, 0
  end
end

-- Whether a cell has these limits. The burst of a calendar cell is its limit.
local function has_limits(cell, limit, burst)
  return cell.limit == limit and (cell.class ~= nil or limit == 0 or cell.burst == burst)
end

-- Limits the used amount to the capacity. The rest counts once the limit is raised within a period.
local function fit_used(cell)
  local excess = cell.excess and now < cell.excess_until and cell.excess or 0
  local used, most = cell.class and cell.used or cell.burst - cell.whole - cell.held, max_carried(cell)
  local left = used + excess - most
  cell.excess, cell.excess_until = nil, nil
  if left > 0 then cell.excess, cell.excess_until = left, now + (cell.per or cell.stop - cell.start) end
  if used > most then
    limit_used(cell, most)
  elseif excess > 0 then
    local more = min(excess, most - used)
    if cell.class then cell.used = cell.used + more else cell.whole = cell.whole - more end
  end
end

-- Changes the limits of a cell, as `Cell::set_quota` does. The used amount stays, at most the new capacity.
local function set_limits(cell, limit, burst)
  if has_limits(cell, limit, burst) then return end
  if limit == 0 then
    cell.last, cell.limit = cell.limit, 0
    return
  end
  if not cell.class then
    cell.whole = cell.whole + burst - cell.burst
    -- What was settled in the clock's period counts.
    if cell.limit == 0 then cell.whole = min(cell.whole, burst - cell.held - cell.clock) end
  end
  cell.limit, cell.burst, cell.last = limit, burst, nil
  fit_used(cell)
end
