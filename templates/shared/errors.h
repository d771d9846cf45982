// Errors that reach Python, and texts of bounded length.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>

namespace pa {

// An exception that reaches Python as the one named kind.
struct Error {
  const char* kind;
  char message[512];
};

// Throw an Error; the message is in printf's format.
[[noreturn, gnu::format(printf, 2, 3)]] inline void Raise(const char* kind, const char* format, ...) {
  Error error{kind, {}};
  va_list values;
  va_start(values, format);
  std::vsnprintf(error.message, sizeof error.message, format, values);
  va_end(values);
  throw error;
}

// A text of bounded length, put together in printf's formats.
class Text {
 public:
  [[gnu::format(printf, 2, 3)]] Text& Add(const char* format, ...) {
    va_list values;
    va_start(values, format);
    const int wanted = std::vsnprintf(text_ + size_, sizeof text_ - size_, format, values);
    va_end(values);
    size_ = std::min<int>(size_ + wanted, sizeof text_ - 1);
    return *this;
  }
  const char* c_str() const { return text_; }

 private:
  char text_[160] = "";
  int size_ = 0;
};

}  // namespace pa
