// Messages without streams. Where libstdc++ is linked into more than one library of a process, a
// stream of one can end up with the other's number facets, and printing a number then crashes.
#pragma once

#include <string>
#include <type_traits>

namespace fasttrace {

template <typename Part>
std::string word(const Part& part) {
  if constexpr (std::is_arithmetic_v<Part>) {
    return std::to_string(part);
  } else {
    return part;
  }
}

template <typename... Parts>
std::string words(const Parts&... parts) {
  std::string text;
  ((text += word(parts)), ...);
  return text;
}

}  // namespace fasttrace
